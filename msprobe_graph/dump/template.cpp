// Text in which only numbers change from one step to the next, filled in without Python and without its lock: the
// thread that writes a step this way takes no time from the one that computes the next.
//
// Plain C functions over plain memory: template.py calls them through ctypes. C++17 for std::to_chars, which gives the
// shortest decimal that reads back as the same double.

#include <charconv>
#include <cstdint>
#include <cstring>

namespace {

constexpr int NORM = 3, NANS = 4, POSITIVES = 5, NEGATIVES = 6, FINITES = 7;  // words of a row: see statistics.ROW
constexpr int LONGEST = 32;  // characters of a number

enum Format : int32_t { REAL = 0, INTEGER = 1, BOOLEAN = 2, UNSIGNED = 3 };

double real(const int64_t* word) {
    double value;
    std::memcpy(&value, word, sizeof value);
    return value;
}

char* write_real(char* out, double value) {
    char* end = std::to_chars(out, out + LONGEST, value).ptr;
    for (const char* at = out; at < end; at++)
        if (*at == '.' || *at == 'e') return end;
    *end++ = '.';  // so that it is read as a float
    *end++ = '0';
    return end;
}

char* write(char* out, const int64_t* word, int32_t format) {
    switch (format) {
        case REAL:
            return write_real(out, real(word));
        case INTEGER:
            return std::to_chars(out, out + LONGEST, *word).ptr;
        case UNSIGNED:
            return std::to_chars(out, out + LONGEST, static_cast<uint64_t>(*word)).ptr;
        default: {
            const char* text = *word ? "true" : "false";
            const size_t size = std::strlen(text);
            std::memcpy(out, text, size);
            return out + size;
        }
    }
}

}  // namespace

extern "C" {

// A value has a row at `word`; `real`: it may hold NaN and infinities.
struct Value {
    int32_t word;
    int32_t real;
};

// A number in the text: where it is, and how it is written.
struct Hole {
    int32_t word;
    int32_t format;
};

// Writes pieces[0], hole 0, pieces[1], hole 1, ... to `out`, which has room for all pieces and 32 bytes a hole. Returns
// how many bytes that are, or -1 where a value is empty or not all finite: such values need more text than others.
int64_t msprobe_graph_fill(const char* text, const int64_t* pieces, const Hole* holes, int64_t hole_count,
                           const Value* values, int64_t value_count, const int64_t* words, char* out) {
    for (int64_t at = 0; at < value_count; at++) {
        const int64_t* row = words + values[at].word;
        if (!row[FINITES] || (values[at].real && (row[NANS] || row[POSITIVES] || row[NEGATIVES]))) return -1;
        const double norm = real(row + NORM);
        if (norm - norm != 0) return -1;
    }
    char* const begin = out;
    for (int64_t at = 0; at <= hole_count; at++) {
        std::memcpy(out, text, pieces[at]);
        text += pieces[at];
        out += pieces[at];
        if (at < hole_count) out = write(out, words + holes[at].word, holes[at].format);
    }
    return out - begin;
}
}
