/* The statistics of one tensor in one pass, read where it lies.
 *
 * Plain C11: neither Python's nor torch's headers, so one build serves every torch. native.py calls it through ctypes.
 *
 * The row a tensor leaves is `struct row` below; statistics.py reads it and portable.py makes the same one from torch
 * operations. A change here or in the order of the dtype codes is a change of MSPROBE_GRAPH_ABI, there and here.
 *
 * Speed. gcc and clang may not reorder a floating-point sum, so a plain loop is not vectorised. The loops below keep
 * LANES sums side by side, which the compiler turns into vector registers at -O3 without -ffast-math, which would give
 * up NaN. They assume finite values; a NaN or an infinity shows in the block's sum of squares, and then only that
 * block is read again, with care.
 *
 * Accuracy. Values of at most 32 bits are squared and summed in double, which neither overflows nor underflows. Blocks
 * of doubles whose squares do are read again in long double (wider than double on x86-64 and aarch64 Linux), and
 * blocks are added up in long double. A thread that flushes subnormals (torch.set_flush_denormal) reads them as 0.
 */
#include <float.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define MSPROBE_GRAPH_ABI 1

#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__) && __GNUC__ >= 12
/* The levels of x86-64 bring FMA with AVX2: a square is added in one operation. */
#define FOR_EACH_CPU __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#elif defined(__x86_64__) && defined(__GLIBC__) && (defined(__GNUC__) || defined(__clang__))
#define FOR_EACH_CPU __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FOR_EACH_CPU
#endif

enum { LANES = 16, BLOCK = 8192, WIDENED = 2048, GATHERED = 1024, MAX_DIMS = 63, PROBES = 3 };

/* 64 bytes. All 0 for an empty tensor; `max` to `norm` mean nothing when no value is finite. An integer dtype (bool
 * too) has no NaN or infinity: its `nan` and `posinf` hold the exact maximum and minimum (of an uint64, its bits),
 * which a double can't from 2^53 on. */
struct row {
    double max, min, mean, norm; /* over the finite values */
    int64_t nan, posinf, neginf; /* how many */
    int64_t finite;              /* how many values are finite */
};

/* What has been read so far. */
struct tally {
    double max, min;
    long double sum, squares;
    int64_t nan, posinf, neginf, finite;
    int64_t imax, imin;    /* exact extremes of an integer dtype */
    uint64_t *bytes;       /* of an 8-bit dtype: how often each of the 256 values occurs */
};

typedef void reader(const void *data, size_t n, struct tally *tally);

/* ---- floating point ---------------------------------------------------------------------------------------------- */

#define FLOAT_READER(NAME, T, WIDE, LARGEST)                                                                           \
    static void NAME##_with_care(const T *x, size_t n, struct tally *tally)                                            \
    {                                                                                                                  \
        T max = -(T)INFINITY, min = (T)INFINITY;                                                                       \
        WIDE sum = 0, squares = 0;                                                                                     \
        int64_t nan = 0, posinf = 0, neginf = 0;                                                                       \
        for (size_t i = 0; i < n; i++) {                                                                               \
            T v = x[i];                                                                                                \
            if (v >= -LARGEST && v <= LARGEST) {                                                                       \
                max = v > max ? v : max;                                                                               \
                min = v < min ? v : min;                                                                               \
                sum += (WIDE)v;                                                                                        \
                squares += (WIDE)v * (WIDE)v;                                                                          \
            } else if (v > LARGEST) {                                                                                  \
                posinf++;                                                                                              \
            } else if (v < -LARGEST) {                                                                                 \
                neginf++;                                                                                              \
            } else {                                                                                                   \
                nan++;                                                                                                 \
            }                                                                                                          \
        }                                                                                                              \
        tally->max = max > tally->max ? max : tally->max;                                                              \
        tally->min = min < tally->min ? min : tally->min;                                                              \
        tally->sum += sum;                                                                                             \
        tally->squares += squares;                                                                                     \
        tally->nan += nan;                                                                                             \
        tally->posinf += posinf;                                                                                       \
        tally->neginf += neginf;                                                                                       \
        tally->finite += (int64_t)n - nan - posinf - neginf;                                                           \
    }                                                                                                                  \
    FOR_EACH_CPU static void NAME##_block(const T *x, size_t n, struct tally *tally)                                   \
    {                                                                                                                  \
        T max[LANES], min[LANES];                                                                                      \
        double sum[LANES], squares[LANES];                                                                             \
        for (int lane = 0; lane < LANES; lane++) {                                                                     \
            max[lane] = min[lane] = x[0];                                                                              \
            sum[lane] = squares[lane] = 0;                                                                             \
        }                                                                                                              \
        size_t i = 0;                                                                                                  \
        for (; i + LANES <= n; i += LANES)                                                                             \
            for (int lane = 0; lane < LANES; lane++) {                                                                 \
                T v = x[i + lane];                                                                                     \
                double d = (double)v;                                                                                  \
                max[lane] = v > max[lane] ? v : max[lane];                                                             \
                min[lane] = v < min[lane] ? v : min[lane];                                                             \
                sum[lane] += d;                                                                                        \
                squares[lane] += d * d;                                                                                \
            }                                                                                                          \
        for (int lane = 0; i < n; i++, lane++) {                                                                       \
            T v = x[i];                                                                                                \
            double d = (double)v;                                                                                      \
            max[lane] = v > max[lane] ? v : max[lane];                                                                 \
            min[lane] = v < min[lane] ? v : min[lane];                                                                 \
            sum[lane] += d;                                                                                            \
            squares[lane] += d * d;                                                                                    \
        }                                                                                                              \
        T most = max[0], least = min[0];                                                                               \
        double total = 0, total_squares = 0;                                                                           \
        for (int lane = 0; lane < LANES; lane++) {                                                                     \
            most = max[lane] > most ? max[lane] : most;                                                                \
            least = min[lane] < least ? min[lane] : least;                                                             \
            total += sum[lane];                                                                                        \
            total_squares += squares[lane];                                                                            \
        }                                                                                                              \
        int zero = most == 0 && least == 0;                                                                            \
        if (!(total_squares <= DBL_MAX) || (total_squares < 1e-280 && !zero)) {                                        \
            NAME##_with_care(x, n, tally);                                                                             \
            return;                                                                                                    \
        }                                                                                                              \
        tally->max = most > tally->max ? most : tally->max;                                                            \
        tally->min = least < tally->min ? least : tally->min;                                                          \
        tally->sum += total;                                                                                           \
        tally->squares += total_squares;                                                                               \
        tally->finite += (int64_t)n;                                                                                   \
    }                                                                                                                  \
    static void NAME(const void *data, size_t n, struct tally *tally)                                                  \
    {                                                                                                                  \
        const T *x = data;                                                                                             \
        for (size_t i = 0; i < n; i += BLOCK)                                                                          \
            NAME##_block(x + i, n - i < BLOCK ? n - i : BLOCK, tally);                                                 \
    }

FLOAT_READER(read_float32, float, double, FLT_MAX)
FLOAT_READER(read_float64, double, long double, DBL_MAX)

static inline float from_bits(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint32_t to_bits(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

/* A float16's exponent is 112 less than a float32's; a subnormal one gets its leading 1 from a subtraction. */
static inline float float16_value(uint16_t half)
{
    const uint32_t bias = 112u << 23, infinite = 0x7c00u << 13, smallest_normal = 1u << 23;
    uint32_t magnitude = (uint32_t)(half & 0x7fffu) << 13, sign = (uint32_t)(half & 0x8000u) << 16;
    uint32_t normal = magnitude + bias + (magnitude >= infinite ? bias : 0);
    uint32_t subnormal = to_bits(from_bits(magnitude + bias + smallest_normal) - from_bits(bias + smallest_normal));
    uint32_t all_if_subnormal = 0u - (uint32_t)(magnitude < smallest_normal);
    return from_bits(sign | (subnormal & all_if_subnormal) | (normal & ~all_if_subnormal));
}

static inline float bfloat16_value(uint16_t half)
{
    return from_bits((uint32_t)half << 16);
}

#define HALF_READER(NAME, VALUE)                                                                                       \
    FOR_EACH_CPU static void NAME##_widen(const uint16_t *restrict x, size_t n, float *restrict wide)                  \
    {                                                                                                                  \
        for (size_t i = 0; i < n; i++)                                                                                 \
            wide[i] = VALUE(x[i]);                                                                                     \
    }                                                                                                                  \
    static void NAME(const void *data, size_t n, struct tally *tally)                                                  \
    {                                                                                                                  \
        const uint16_t *x = data;                                                                                      \
        float wide[WIDENED];                                                                                           \
        for (size_t i = 0; i < n; i += WIDENED) {                                                                      \
            size_t length = n - i < WIDENED ? n - i : WIDENED;                                                         \
            NAME##_widen(x + i, length, wide);                                                                         \
            read_float32_block(wide, length, tally);                                                                   \
        }                                                                                                              \
    }

HALF_READER(read_float16, float16_value)
HALF_READER(read_bfloat16, bfloat16_value)

/* ---- integers ---------------------------------------------------------------------------------------------------- */

/* Exact extremes; the moments are those of the values as doubles, whose sums over a block are exact up to 32 bits. SIGN
 * moves an unsigned 64-bit value into the signed order, in which the extremes are kept. */
#define INTEGER_READER(NAME, T, SIGN)                                                                                  \
    FOR_EACH_CPU static void NAME##_block(const T *restrict x, size_t n, double *restrict wide, struct tally *tally)   \
    {                                                                                                                  \
        T max = x[0], min = x[0];                                                                                      \
        for (size_t i = 0; i < n; i++) {                                                                               \
            max = x[i] > max ? x[i] : max;                                                                             \
            min = x[i] < min ? x[i] : min;                                                                             \
        }                                                                                                              \
        for (size_t i = 0; i < n; i++)                                                                                 \
            wide[i] = (double)x[i];                                                                                    \
        int64_t most = (int64_t)((uint64_t)max ^ (SIGN)), least = (int64_t)((uint64_t)min ^ (SIGN));                   \
        tally->imax = most > tally->imax ? most : tally->imax;                                                         \
        tally->imin = least < tally->imin ? least : tally->imin;                                                       \
    }                                                                                                                  \
    static void NAME(const void *data, size_t n, struct tally *tally)                                                  \
    {                                                                                                                  \
        const T *x = data;                                                                                             \
        double wide[WIDENED];                                                                                          \
        for (size_t i = 0; i < n; i += WIDENED) {                                                                      \
            size_t length = n - i < WIDENED ? n - i : WIDENED;                                                         \
            NAME##_block(x + i, length, wide, tally);                                                                  \
            read_float64_block(wide, length, tally);                                                                   \
        }                                                                                                              \
    }

#define SIGN_BIT ((uint64_t)1 << 63)
INTEGER_READER(read_int64, int64_t, 0)
INTEGER_READER(read_int32, int32_t, 0)
INTEGER_READER(read_int16, int16_t, 0)
INTEGER_READER(read_uint64, uint64_t, SIGN_BIT)
INTEGER_READER(read_uint32, uint32_t, 0)
INTEGER_READER(read_uint16, uint16_t, 0)

/* ---- eight bits: bool, int8, uint8 and every 8-bit float --------------------------------------------------------- */

/* 256 values can be counted, whatever they mean. Four counts in turn, as equal neighbours would wait for each other. */
static void read_bytes(const void *data, size_t n, struct tally *tally)
{
    const uint8_t *x = data;
    const size_t most = (size_t)1 << 30; /* what a 32-bit count holds */
    for (size_t start = 0; start < n; start += most) {
        size_t end = n - start < most ? n : start + most, i = start;
        uint32_t counts[4][256] = {{0}};
        for (; i + 4 <= end; i += 4) {
            counts[0][x[i]]++;
            counts[1][x[i + 1]]++;
            counts[2][x[i + 2]]++;
            counts[3][x[i + 3]]++;
        }
        for (; i < end; i++)
            counts[0][x[i]]++;
        for (int byte = 0; byte < 256; byte++)
            tally->bytes[byte] += (uint64_t)counts[0][byte] + counts[1][byte] + counts[2][byte] + counts[3][byte];
    }
}

static void weigh_bytes(const double *meaning, struct tally *tally)
{
    for (int byte = 0; byte < 256; byte++) {
        double v = meaning[byte];
        int64_t count = (int64_t)tally->bytes[byte];
        if (count == 0)
            continue;
        if (v > DBL_MAX) {
            tally->posinf += count;
        } else if (v < -DBL_MAX) {
            tally->neginf += count;
        } else if (v != v) {
            tally->nan += count;
        } else {
            tally->max = v > tally->max ? v : tally->max;
            tally->min = v < tally->min ? v : tally->min;
            tally->sum += (long double)v * count;
            tally->squares += (long double)v * v * count;
            tally->finite += count;
        }
    }
}

/* ---- dtypes ------------------------------------------------------------------------------------------------------ */

/* In the order of native.DTYPES; after these come the 8-bit dtypes, the integers of them first. */
enum { FLOAT64, FLOAT32, FLOAT16, BFLOAT16, INT64, INT32, INT16, UINT64, UINT32, UINT16, BYTES };
enum { BYTE_INTEGERS = 3, BYTE_DTYPES = 16 };

static const struct {
    reader *read;
    size_t size;
} DTYPES[] = {
    [FLOAT64] = {read_float64, 8}, [FLOAT32] = {read_float32, 4},   [FLOAT16] = {read_float16, 2},
    [BFLOAT16] = {read_bfloat16, 2}, [INT64] = {read_int64, 8},     [INT32] = {read_int32, 4},
    [INT16] = {read_int16, 2},     [UINT64] = {read_uint64, 8},     [UINT32] = {read_uint32, 4},
    [UINT16] = {read_uint16, 2},   [BYTES] = {read_bytes, 1},
};

/* What the 256 bytes of each 8-bit dtype mean: set once, when the library is loaded. */
static double meanings[BYTE_DTYPES][256];

static int row_of(int32_t dtype)
{
    return dtype < BYTES ? dtype : BYTES;
}

/* ---- layouts ----------------------------------------------------------------------------------------------------- */

/* A tensor's elements as a set: no dimension of one element, none that merely repeats (`times` holds that), none that
 * continues the next one, the largest stride first. A permuted dense tensor is one dimension of stride 1. */
struct layout {
    int dims; /* of at least two elements each: fewer than MAX_DIMS, as an element count fits in 63 bits */
    int64_t size[MAX_DIMS], stride[MAX_DIMS];
    int64_t times;
    int64_t count; /* elements, repetitions left out */
};

static void arrange(int32_t dims, const int64_t *sizes, const int64_t *strides, struct layout *layout)
{
    layout->dims = 0;
    layout->times = layout->count = 1;
    for (int32_t i = 0; i < dims; i++) {
        if (sizes[i] == 1)
            continue;
        if (strides[i] == 0) {
            layout->times *= sizes[i];
            continue;
        }
        layout->count *= sizes[i];
        int at = layout->dims++;
        for (; at > 0 && layout->stride[at - 1] < strides[i]; at--) {
            layout->size[at] = layout->size[at - 1];
            layout->stride[at] = layout->stride[at - 1];
        }
        layout->size[at] = sizes[i];
        layout->stride[at] = strides[i];
    }
    int last = 0;
    for (int i = 1; i < layout->dims; i++) {
        if (layout->stride[last] == layout->size[i] * layout->stride[i]) {
            layout->size[last] *= layout->size[i];
        } else {
            last++;
            layout->size[last] = layout->size[i];
        }
        layout->stride[last] = layout->stride[i];
    }
    if (layout->dims == 0)
        layout->size[0] = layout->stride[0] = 1;
    layout->dims = last + 1;
}

#define GATHER(SIZE)                                                                                                   \
    for (int64_t i = 0; i < n; i++)                                                                                    \
    memcpy(to + i * SIZE, from + i * stride * SIZE, SIZE)

static void gather(const char *from, int64_t stride, int64_t n, size_t size, char *to)
{
    if (stride == 1) {
        memcpy(to, from, (size_t)n * size);
        return;
    }
    switch (size) {
    case 1: GATHER(1); break;
    case 2: GATHER(2); break;
    case 4: GATHER(4); break;
    default: GATHER(8);
    }
}

/* Long dense runs are read where they lie, the rest through a buffer that stays in the nearest cache. */
static void walk(const char *data, const struct layout *layout, size_t size, reader *read, struct tally *tally)
{
    const int inner = layout->dims - 1;
    const int64_t length = layout->size[inner], stride = layout->stride[inner];
    int64_t position[MAX_DIMS] = {0}, held = 0;
    uint64_t buffer[GATHERED];
    char *bytes = (char *)buffer;
    for (;;) {
        if (stride == 1 && length >= GATHERED) {
            read(data, (size_t)length, tally);
        } else {
            for (int64_t i = 0; i < length;) {
                int64_t n = length - i < GATHERED - held ? length - i : GATHERED - held;
                gather(data + (size_t)(i * stride) * size, stride, n, size, bytes + (size_t)held * size);
                i += n;
                held += n;
                if (held == GATHERED) {
                    read(buffer, GATHERED, tally);
                    held = 0;
                }
            }
        }
        int dim = inner - 1;
        for (; dim >= 0; dim--) {
            data += (size_t)layout->stride[dim] * size;
            if (++position[dim] < layout->size[dim])
                break;
            data -= (size_t)(layout->stride[dim] * layout->size[dim]) * size;
            position[dim] = 0;
        }
        if (dim < 0)
            break;
    }
    if (held)
        read(buffer, (size_t)held, tally);
}

/* ---- what native.py calls ---------------------------------------------------------------------------------------- */

static void begin(struct tally *tally, int32_t dtype, uint64_t *bytes)
{
    *tally = (struct tally){.max = -INFINITY, .min = INFINITY, .imax = INT64_MIN, .imin = INT64_MAX, .bytes = bytes};
    if (dtype >= BYTES)
        memset(bytes, 0, 256 * sizeof *bytes);
}

static void finish(struct tally *tally, int32_t dtype, int64_t times, struct row *row)
{
    if (dtype >= BYTES) {
        weigh_bytes(meanings[dtype - BYTES], tally);
        tally->imax = (int64_t)tally->max;
        tally->imin = (int64_t)tally->min;
    }
    memset(row, 0, sizeof *row);
    if (dtype >= INT64 && dtype < BYTES + BYTE_INTEGERS) {
        if (dtype == UINT64) {
            row->nan = (int64_t)((uint64_t)tally->imax ^ SIGN_BIT);
            row->posinf = (int64_t)((uint64_t)tally->imin ^ SIGN_BIT);
            row->max = (double)(uint64_t)row->nan;
            row->min = (double)(uint64_t)row->posinf;
        } else {
            row->nan = tally->imax;
            row->posinf = tally->imin;
            row->max = (double)tally->imax;
            row->min = (double)tally->imin;
        }
    } else {
        row->nan = tally->nan * times;
        row->posinf = tally->posinf * times;
        row->neginf = tally->neginf * times;
        if (tally->finite) {
            row->max = tally->max;
            row->min = tally->min;
        }
    }
    if (tally->finite) {
        row->mean = (double)(tally->sum / tally->finite);
        row->norm = (double)sqrtl(tally->squares * times);
        row->finite = tally->finite * times;
    }
}

int32_t msprobe_graph_abi(void)
{
    return MSPROBE_GRAPH_ABI;
}

/* Says what each of the 256 bytes of an 8-bit dtype means. */
void msprobe_graph_bytes_mean(int32_t dtype, const double *values)
{
    memcpy(meanings[dtype - BYTES], values, sizeof meanings[0]);
}

/* Measures `n` >= 1 elements that lie one behind the other. */
void msprobe_graph_dense(const void *data, int64_t n, int32_t dtype, struct row *row)
{
    struct tally tally;
    uint64_t bytes[256];
    begin(&tally, dtype, bytes);
    DTYPES[row_of(dtype)].read(data, (size_t)n, &tally);
    finish(&tally, dtype, 1, row);
}

/* Measures a tensor of any strides (in elements, none negative) that has at least one element. */
void msprobe_graph_strided(const void *data, int32_t dims, const int64_t *sizes, const int64_t *strides, int32_t dtype,
                           struct row *row)
{
    struct layout layout;
    struct tally tally;
    uint64_t bytes[256];
    arrange(dims, sizes, strides, &layout);
    begin(&tally, dtype, bytes);
    if (layout.dims == 1 && layout.stride[0] == 1)
        DTYPES[row_of(dtype)].read(data, (size_t)layout.count, &tally);
    else
        walk(data, &layout, DTYPES[row_of(dtype)].size, DTYPES[row_of(dtype)].read, &tally);
    finish(&tally, dtype, layout.times, row);
}

/* A hash of the bytes of PROBES elements, `n` dense elements of `size` bytes apart evenly from the first to the last
 * (of all, where there are fewer). Each step is a bijection of the hash for a given element, so one changed element
 * always changes it. */
uint64_t msprobe_graph_fingerprint(const void *data, int64_t n, int64_t size)
{
    const int64_t probes = n < PROBES ? n : PROBES;
    uint64_t hash = (uint64_t)n;
    for (int64_t i = 0; i < probes; i++) {
        int64_t at = n <= PROBES ? i : (n - 1) * i / (PROBES - 1);
        const char *element = (const char *)data + at * size;
        for (int64_t taken = 0; taken < size; taken += 8) {
            uint64_t word = 0;
            memcpy(&word, element + taken, (size_t)(size - taken < 8 ? size - taken : 8));
            hash = (hash ^ word) * 0x9e3779b97f4a7c15u;
            hash ^= hash >> 29;
        }
    }
    return hash;
}

/* The exclusive or of the bytes taken eight at a time in memory order, the last eight filled up with zeros. */
int64_t msprobe_graph_xor(const void *data, int64_t n)
{
    const char *bytes = data;
    uint64_t all = 0, word;
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
        memcpy(&word, bytes + i, 8);
        all ^= word;
    }
    word = 0;
    memcpy(&word, bytes + i, (size_t)(n - i));
    return (int64_t)(all ^ word);
}
