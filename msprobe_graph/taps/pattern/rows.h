#pragma once

// The rows of one step, and how values are measured into them: on the CPU by statistics.c, on a GPU by a kernel.

#include <unordered_map>

#include "likeness.h"
#include "probes.h"

namespace {

// A row of statistics, as statistics.c writes it.
struct Row {
    int64_t words[8];
};

typedef void Dense(const void* data, int64_t count, int32_t dtype, Row* row);
typedef void Strided(const void* data, int32_t dims, const int64_t* sizes, const int64_t* strides, int32_t dtype,
                     Row* row);
Dense* dense;
Strided* strided;

// The driver's cuLaunchKernel, and torch's current device, and whether its current stream is captured.
typedef int CuLaunchKernel(void* function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned shared,
                           void* stream, void** parameters, void** extra);
CuLaunchKernel* cu_launch_kernel;
PyObject *current_device, *is_capturing;

constexpr int64_t WORTH_REMEMBERING = 128 * 1024;  // bytes; see measured.py

// A tensor that was measured into a row, as it was then.
struct Seen {
    Ref tensor;  // a weak reference
    int64_t version;
    uint64_t fingerprint;
    void* address;
    int64_t count;
    size_t row;
};

// Values that were measured: what they are like, and the first of their rows on the CPU and on the GPU.
struct Measured {
    Ref likeness;
    size_t row, gpu_row;
};

// Rows in a GPU's memory, which one stream writes. A value's header is followed by the rows of its parts.
struct GpuRows {
    int64_t device = -1;
    void* stream = nullptr;
    int64_t address = 0, room = 0, used = 0;
    bool ran_out = false;
    std::vector<int64_t> headers;  // of each value: which row
};

struct Table {
    PyObject_HEAD
    GpuRows gpu;
    bool without_gradients;  // calls whose gradients are recorded are to be described anew
    Ref weights;             // Probes, until they have been looked at
    bool weights_stand;
    std::vector<Measured> calls;
    std::vector<Row> rows;
    std::unordered_map<PyObject*, Seen> seen;
};

// A large tensor that lies in one piece is known again by its version and by a look at some of its elements, as there
// are operators that write into their arguments without saying so.
bool worth_remembering(const Leaf& leaf) {
    return leaf.contiguous && leaf.count * leaf.element_size() >= WORTH_REMEMBERING;
}

uint64_t look_at(const Leaf& leaf) { return fingerprint(leaf.seen.data, leaf.count, leaf.element_size()); }

// The row of a tensor that was measured before and is as it was; else null.
const Row* seen_before(const Table* table, const Leaf& leaf) {
    const auto found = table->seen.find(leaf.tensor.get());
    if (found == table->seen.end()) return nullptr;
    const Seen& seen = found->second;
    int64_t version;
    const bool same = PyWeakref_GetObject(seen.tensor.get()) == leaf.tensor.get() &&
                      integer(Ref(PyObject_GetAttr(leaf.tensor.get(), names.version)), version) &&
                      version == seen.version && leaf.seen.data == seen.address && leaf.count == seen.count &&
                      look_at(leaf) == seen.fingerprint;
    PyErr_Clear();
    return same ? &table->rows[seen.row] : nullptr;
}

// Tensors of inference mode, which have no version, are measured every time.
void remember(Table* table, const Leaf& leaf, size_t row) {
    PyObject* const tensor = leaf.tensor.get();
    int64_t version;
    if (called(tensor, names.is_inference).get() == Py_False &&
        integer(Ref(PyObject_GetAttr(tensor, names.version)), version)) {
        Ref weak(PyWeakref_NewRef(tensor, nullptr));
        if (weak) table->seen[tensor] = Seen{std::move(weak), version, look_at(leaf), leaf.seen.data, leaf.count, row};
    }
    PyErr_Clear();
}

bool read(Table* table, const Leaf& leaf, Row* row) {
    if (!leaf.count) return true;  // a row of zeros is that of an empty tensor
    const Row* const known = worth_remembering(leaf) ? seen_before(table, leaf) : nullptr;
    if (known) {
        *row = *known;
        return true;
    }
    if (leaf.contiguous)
        dense(leaf.seen.data, leaf.count, leaf.part->code, row);
    else
        strided(leaf.seen.data, leaf.seen.dims, leaf.seen.shape, leaf.seen.strides, leaf.part->code, row);
    return true;
}

// Whether the current stream of the device that these tensors lie on is the one that writes the rows, and computes now.
bool gpu_ready(const GpuRows& gpu, const DLDevice& of_tensors) {
    int64_t device;
    void* stream;
    return gpu.room && of_tensors.id == gpu.device && integer(Ref(PyObject_CallNoArgs(current_device)), device) &&
           device == gpu.device && !exchange->current_stream(of_tensors.type, of_tensors.id, &stream) &&
           stream == gpu.stream && Ref(PyObject_CallNoArgs(is_capturing)).get() == Py_False;
}

// Has the GPU measure a tensor, behind all that it was told to do before: triton_kernels.measure_one.
bool launch(Table* table, const Leaf& leaf, int64_t& header) {
    GpuRows& gpu = table->gpu;
    const Launch& how = *leaf.part->launch;
    gpu.ran_out = gpu.ran_out || gpu.used + how.parts + 1 > gpu.room;
    if (gpu.ran_out) return false;
    header = gpu.used;
    gpu.used += how.parts + 1;
    void* tensor = leaf.seen.data;
    int64_t numbers[] = {leaf.count,     how.each,       how.parts,      header,         0,             how.layout[0],
                         how.layout[1], how.layout[2], how.layout[3], how.layout[4], how.layout[5], how.layout[6]};
    int64_t meaning = how.meaning, rows = gpu.address, null = 0;
    std::vector<void*> parameters{&tensor};
    if (meaning) parameters.push_back(&meaning);
    parameters.push_back(&rows);
    for (int64_t& number : numbers) parameters.push_back(&number);
    for (int64_t at = 0; at < how.nulls; at++) parameters.push_back(&null);
    return !cu_launch_kernel(reinterpret_cast<void*>(how.function), how.parts, 1, 1, how.threads, 1, 1, how.shared,
                             gpu.stream, parameters.data(), nullptr);
}

// Measures the tensors in `values` if they are like those that `likeness` is of: see likeness.Likeness.
bool measure(Table* table, PyObject* likeness, PyObject* values) {
    const Pattern* const pattern = reinterpret_cast<Pattern*>(PyTuple_GET_ITEM(likeness, 0));
    const Unseen unseen(pattern->overrides);
    if (!unseen) return false;
    Match match(pattern->parts);
    if (!match.whole(values)) return false;
    std::vector<Row> rows;
    std::vector<int64_t> headers;
    for (const Leaf& leaf : match.leaves) {
        if (leaf.part->kind == ON_GPU) {
            if (headers.empty() && !gpu_ready(table->gpu, leaf.seen.device)) return false;
            int64_t header;
            if (!launch(table, leaf, header)) {  // what was launched is brought all the same, which clears its rows
                table->gpu.headers.insert(table->gpu.headers.end(), headers.begin(), headers.end());
                return false;
            }
            headers.push_back(header);
        } else {
            rows.push_back(Row());
            if (!read(table, leaf, &rows.back())) return false;
        }
    }
    size_t row = table->rows.size();
    if (!match.leaves.empty()) table->calls.push_back({Ref::shared(likeness), row, table->gpu.headers.size()});
    table->rows.insert(table->rows.end(), rows.begin(), rows.end());
    table->gpu.headers.insert(table->gpu.headers.end(), headers.begin(), headers.end());
    for (const Leaf& leaf : match.leaves)
        if (leaf.part->kind == TENSOR) {
            if (worth_remembering(leaf)) remember(table, leaf, row);
            row++;
        }
    return true;
}

}  // namespace
