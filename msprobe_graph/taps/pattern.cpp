// What the values of a call were like, checked and measured without Python's own code: `Pattern` and `Table`, for
// likeness.py. And `stack_key`, for call stacks.
//
// A Python extension that knows torch by its Python face alone (attributes and methods of tensors), so that it fits
// every version. It is optional: without it each call is described anew.

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <structmember.h>

#include <cstdint>
#include <cstring>
#include <new>
#include <unordered_map>
#include <utility>
#include <vector>

namespace {

// Owns one reference.
class Ref {
  public:
    Ref() = default;
    explicit Ref(PyObject* owned) : object(owned) {}
    Ref(const Ref&) = delete;
    Ref(Ref&& other) noexcept : object(other.object) { other.object = nullptr; }
    Ref& operator=(Ref&& other) noexcept {
        std::swap(object, other.object);
        return *this;
    }
    ~Ref() { Py_XDECREF(object); }
    static Ref shared(PyObject* borrowed) {
        Py_XINCREF(borrowed);
        return Ref(borrowed);
    }
    PyObject* get() const { return object; }
    PyObject* release() { return std::exchange(object, nullptr); }
    explicit operator bool() const { return object != nullptr; }

  private:
    PyObject* object = nullptr;
};

PyObject* none() { return Ref::shared(Py_None).release(); }

// Names of attributes, made once.
struct Names {
    PyObject *dtype, *shape, *requires_grad, *is_cpu, *is_contiguous, *is_neg, *data_ptr, *stride, *version;
    PyObject *get_device, *is_inference, *anchor, *before, *enter, *exit, *frame, *module, *name, *number, *outer, *parent, *path, *stack, *walk;
} names;

// A row of statistics, as statistics.c writes it.
struct Row {
    int64_t words[8];
};

typedef void Dense(const void* data, int64_t count, int32_t dtype, Row* row);
typedef void Strided(const void* data, int32_t dims, const int64_t* sizes, const int64_t* strides, int32_t dtype,
                     Row* row);
typedef uint64_t Fingerprint(const void* data, int64_t count, int64_t size);
Dense* dense;
Strided* strided;
Fingerprint* fingerprint;

// torch's own: how many function modes are on, the context that hides from them, and whether gradients are recorded.
PyObject *modes_on, *disable_modes, *is_grad_enabled;

// The driver's cuLaunchKernel, and torch's current stream of a device, current device, and whether it is captured.
typedef int CuLaunchKernel(void* function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned shared,
                           void* stream, void** parameters, void** extra);
CuLaunchKernel* cu_launch_kernel;
PyObject *current_stream, *current_device, *is_capturing;

constexpr int64_t LARGE = 1 << 24;  // elements; while more are read, other threads run
constexpr int64_t WORTH_REMEMBERING = 8 * 1024;  // bytes; less is measured again in the time that it takes to look it up

constexpr int64_t MAPPED = int64_t(1) << 40;  // see unmeasurable.py

// The order is that of likeness.Kind.
enum Kind { TENSOR, WEIGHT, EQUAL, TYPE, ITEMS, KEYS, FIELDS, ON_GPU };

// How a tensor on a GPU is measured: see launches.Launch.
struct Launch {
    long long device, function, shared, threads, nulls, meaning, parts, each, alignment;
    long long layout[7];
};

struct Part {
    Kind kind;
    Ref type;
    Ref object;  // WEIGHT: it; EQUAL: the value; KEYS, FIELDS: a tuple of names
    Ref dtype;   // TENSOR, ON_GPU, WEIGHT
    int64_t size = 0;  // ITEMS: how many; TENSOR: bytes of an element
    int32_t code = 0;
    bool requires_grad = false;
    std::vector<int64_t> shape;
    int64_t version = 0;
    int64_t address = 0;
    std::vector<int64_t> strides;  // ON_GPU
    Launch launch;

    int64_t count() const {
        int64_t count = 1;
        for (int64_t size : shape) count *= size;
        return count;
    }
};

struct Leaf {
    PyObject* tensor;  // borrowed: the call's values hold it
    const Part* part;
    void* address;
    int64_t count;
    bool contiguous;
};

bool integer(Ref value, int64_t& out) {
    if (!value) return false;
    out = PyLong_AsLongLong(value.get());
    return out != -1 || !PyErr_Occurred();
}

bool same_attribute(PyObject* of, PyObject* name, PyObject* expected) {
    Ref found(PyObject_GetAttr(of, name));
    return found.get() == expected;
}

Ref called(PyObject* of, PyObject* name) { return Ref(PyObject_CallMethodNoArgs(of, name)); }

bool same_numbers(const Ref& found, const std::vector<int64_t>& expected) {
    if (!found || !PyTuple_Check(found.get()) || PyTuple_GET_SIZE(found.get()) != (Py_ssize_t)expected.size())
        return false;
    for (size_t at = 0; at < expected.size(); at++)
        if (PyLong_AsLongLong(PyTuple_GET_ITEM(found.get(), at)) != expected[at]) return false;
    return true;
}

// False, maybe with an exception set, where a value is not like its part.
class Match {
  public:
    explicit Match(const std::vector<Part>& parts) : parts(parts) { leaves.reserve(8); }
    std::vector<Leaf> leaves;

    bool whole(PyObject* value) { return like(value) && at == parts.size(); }

  private:
    const std::vector<Part>& parts;
    size_t at = 0;

    bool like(PyObject* value) {
        if (at == parts.size() || !value) return false;
        const Part& part = parts[at++];
        if (part.kind == WEIGHT) return value == part.object.get() && unchanged(part, value);
        if (part.kind == EQUAL && value == part.object.get()) return true;
        if ((PyObject*)Py_TYPE(value) != part.type.get()) return false;
        switch (part.kind) {
            case TENSOR:
                return tensor(part, value);
            case ON_GPU:
                return on_gpu(part, value);
            case EQUAL:
                return PyObject_RichCompareBool(value, part.object.get(), Py_EQ) == 1;
            case TYPE:
                return true;
            case ITEMS:
                return items(part, value);
            case KEYS:
                return keys(part, value);
            default:
                return fields(part, value);
        }
    }

    bool same_form(const Part& part, PyObject* value) {
        return same_attribute(value, names.dtype, part.dtype.get()) &&
               same_numbers(Ref(PyObject_GetAttr(value, names.shape)), part.shape) &&
               same_attribute(value, names.requires_grad, part.requires_grad ? Py_True : Py_False);
    }

    bool unchanged(const Part& part, PyObject* value) {
        int64_t version, address;
        return same_form(part, value) && integer(Ref(PyObject_GetAttr(value, names.version)), version) &&
               version == part.version && integer(called(value, names.data_ptr), address) && address == part.address;
    }

    bool on_gpu(const Part& part, PyObject* value) {
        int64_t device, address;
        if (!same_form(part, value) || !integer(called(value, names.get_device), device) ||
            device != part.launch.device || !same_numbers(called(value, names.stride), part.strides) ||
            !integer(called(value, names.data_ptr), address) || address % part.launch.alignment ||
            called(value, names.is_neg).get() != Py_False)
            return false;
        leaves.push_back({value, &part, reinterpret_cast<void*>(address), part.count(), true});
        return true;
    }

    bool tensor(const Part& part, PyObject* value) {
        if (!same_form(part, value) || !same_attribute(value, names.is_cpu, Py_True)) return false;
        const int64_t count = part.count();
        int64_t address;
        const Ref contiguous = called(value, names.is_contiguous);
        if (!contiguous || !integer(called(value, names.data_ptr), address)) return false;
        if (count && address < MAPPED) return false;
        const bool run = contiguous.get() == Py_True && count > 1;
        // Only part of a complex tensor's memory can be marked as negative: with two elements or more it is no run.
        if (!run && called(value, names.is_neg).get() != Py_False) return false;
        leaves.push_back({value, &part, reinterpret_cast<void*>(address), count, run});
        return true;
    }

    bool items(const Part& part, PyObject* value) {
        const bool tuple = PyTuple_Check(value);
        if (!tuple && !PyList_Check(value)) return false;
        if ((tuple ? PyTuple_GET_SIZE(value) : PyList_GET_SIZE(value)) != part.size) return false;
        for (int64_t index = 0; index < part.size; index++)
            if (!like(tuple ? PyTuple_GET_ITEM(value, index) : PyList_GET_ITEM(value, index))) return false;
        return true;
    }

    bool keys(const Part& part, PyObject* value) {
        const Py_ssize_t count = PyTuple_GET_SIZE(part.object.get());
        if (!PyDict_Check(value) || PyDict_GET_SIZE(value) != count) return false;
        for (Py_ssize_t index = 0; index < count; index++)
            if (!like(PyDict_GetItemWithError(value, PyTuple_GET_ITEM(part.object.get(), index)))) return false;
        return true;
    }

    bool fields(const Part& part, PyObject* value) {
        for (Py_ssize_t index = 0; index < PyTuple_GET_SIZE(part.object.get()); index++) {
            const Ref field(PyObject_GetAttr(value, PyTuple_GET_ITEM(part.object.get(), index)));
            if (!like(field.get())) return false;
        }
        return true;
    }
};

struct Pattern {
    PyObject_HEAD
    std::vector<Part> parts;
};

bool read_part(PyObject* given, Part& part) {
    int kind;
    PyObject *type, *object, *dtype, *shape, *strides, *launch;
    int code, requires_grad;
    long long size;
    if (!PyArg_ParseTuple(given, "iOOOLipO!O!O", &kind, &type, &object, &dtype, &size, &code, &requires_grad,
                          &PyTuple_Type, &shape, &PyTuple_Type, &strides, &launch))
        return false;
    part.kind = static_cast<Kind>(kind);
    part.type = Ref::shared(type);
    part.object = Ref::shared(object);
    part.dtype = Ref::shared(dtype);
    part.size = size;
    part.code = code;
    part.requires_grad = requires_grad;
    for (Py_ssize_t at = 0; at < PyTuple_GET_SIZE(shape); at++)
        part.shape.push_back(PyLong_AsLongLong(PyTuple_GET_ITEM(shape, at)));
    for (Py_ssize_t at = 0; at < PyTuple_GET_SIZE(strides); at++)
        part.strides.push_back(PyLong_AsLongLong(PyTuple_GET_ITEM(strides, at)));
    Launch& to = part.launch;
    if (launch != Py_None &&
        !PyArg_ParseTuple(launch, "LLLLLLLLL(LLLLLLL)", &to.device, &to.function, &to.shared, &to.threads, &to.nulls,
                          &to.meaning, &to.parts, &to.each, &to.alignment, to.layout, to.layout + 1, to.layout + 2,
                          to.layout + 3, to.layout + 4, to.layout + 5, to.layout + 6))
        return false;
    if (part.kind == WEIGHT)
        return integer(Ref(PyObject_GetAttr(object, names.version)), part.version) &&
               integer(called(object, names.data_ptr), part.address);
    return !PyErr_Occurred();
}

PyObject* new_pattern(PyTypeObject* type, PyObject* arguments, PyObject*) {
    PyObject* given;
    if (!PyArg_ParseTuple(arguments, "O!", &PyList_Type, &given)) return nullptr;
    Pattern* self = reinterpret_cast<Pattern*>(type->tp_alloc(type, 0));
    if (!self) return nullptr;
    new (&self->parts) std::vector<Part>(PyList_GET_SIZE(given));
    for (Py_ssize_t at = 0; at < PyList_GET_SIZE(given); at++)
        if (!read_part(PyList_GET_ITEM(given, at), self->parts[at])) {
            Py_DECREF(self);
            return nullptr;
        }
    return reinterpret_cast<PyObject*>(self);
}

void delete_pattern(PyObject* self) {
    reinterpret_cast<Pattern*>(self)->parts.~vector();
    Py_TYPE(self)->tp_free(self);
}

// A tensor that was measured into a row, as it was then.
struct Seen {
    Ref tensor;  // a weak reference
    int64_t version;
    size_t row;
};

// Values that were measured: what they are like, and the first of their rows.
struct Measured {
    Ref likeness;
    size_t row;
};

// Tensors as they were when they were probed: see measured.py.
struct Probe {
    Ref tensor;  // a weak reference
    int64_t address, count, size;
    uint64_t fingerprint;
};

struct Probes {
    PyObject_HEAD
    std::vector<Probe> each;
};

PyObject* new_probes(PyTypeObject* type, PyObject* arguments, PyObject*) {
    PyObject* given;
    if (!PyArg_ParseTuple(arguments, "O!", &PyList_Type, &given)) return nullptr;
    Probes* self = reinterpret_cast<Probes*>(type->tp_alloc(type, 0));
    if (!self) return nullptr;
    new (&self->each) std::vector<Probe>(PyList_GET_SIZE(given));
    for (Py_ssize_t at = 0; at < PyList_GET_SIZE(given); at++) {
        PyObject* tensor;
        long long address, count, size;
        unsigned long long found;
        if (!PyArg_ParseTuple(PyList_GET_ITEM(given, at), "OLLLK", &tensor, &address, &count, &size, &found)) {
            Py_DECREF(self);
            return nullptr;
        }
        self->each[at] = Probe{Ref::shared(tensor), address, count, size, found};
    }
    return reinterpret_cast<PyObject*>(self);
}

void delete_probes(PyObject* self) {
    reinterpret_cast<Probes*>(self)->each.~vector();
    Py_TYPE(self)->tp_free(self);
}

// Whether all tensors are where they were, and look as they did.
bool stand(const Probes* probes) {
    for (const Probe& probe : probes->each) {
        PyObject* tensor = PyWeakref_GetObject(probe.tensor.get());
        int64_t address;
        const bool there = tensor && tensor != Py_None && integer(called(tensor, names.data_ptr), address) &&
                           address == probe.address;
        if (!there || fingerprint(reinterpret_cast<void*>(address), probe.count, probe.size) != probe.fingerprint) {
            PyErr_Clear();
            return false;
        }
    }
    return true;
}

// Rows in a GPU's memory, which one stream writes. A value's header is followed by the rows of its parts.
struct GpuRows {
    int64_t device = -1, stream = 0, address = 0, room = 0, used = 0;
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

// The number of the row of a large tensor that was measured before and is as it was; else -1.
int64_t seen_before(const Table* table, const Leaf& leaf) {
    if (leaf.count * leaf.part->size < WORTH_REMEMBERING) return -1;
    const auto found = table->seen.find(leaf.tensor);
    if (found == table->seen.end() || PyWeakref_GetObject(found->second.tensor.get()) != leaf.tensor) return -1;
    int64_t version;
    const bool known = integer(Ref(PyObject_GetAttr(leaf.tensor, names.version)), version);
    PyErr_Clear();
    return known && version == found->second.version ? static_cast<int64_t>(found->second.row) : -1;
}

void remember(Table* table, PyObject* tensor, size_t row) {
    int64_t version;
    if (called(tensor, names.is_inference).get() == Py_False && integer(Ref(PyObject_GetAttr(tensor, names.version)), version)) {  // which tensors of inference mode lack
        Ref weak(PyWeakref_NewRef(tensor, nullptr));
        if (weak) table->seen[tensor] = Seen{std::move(weak), version, row};
    }
    PyErr_Clear();
}

bool read_strided(const Leaf& leaf, Row* row) {
    const Ref stride = called(leaf.tensor, names.stride);
    if (!stride || !PyTuple_Check(stride.get())) return false;
    std::vector<int64_t> strides;
    for (Py_ssize_t at = 0; at < PyTuple_GET_SIZE(stride.get()); at++)
        strides.push_back(PyLong_AsLongLong(PyTuple_GET_ITEM(stride.get(), at)));
    if (strides.size() != leaf.part->shape.size() || PyErr_Occurred()) return false;
    strided(leaf.address, strides.size(), leaf.part->shape.data(), strides.data(), leaf.part->code, row);
    return true;
}

bool read(Table* table, const Leaf& leaf, Row* row) {
    if (!leaf.count) return true;  // a row of zeros is that of an empty tensor
    const int64_t known = seen_before(table, leaf);
    if (known >= 0) {
        *row = table->rows[known];
        return true;
    }
    if (!leaf.contiguous) return read_strided(leaf, row);
    if (leaf.count < LARGE) {
        dense(leaf.address, leaf.count, leaf.part->code, row);
    } else {
        Py_BEGIN_ALLOW_THREADS;
        dense(leaf.address, leaf.count, leaf.part->code, row);
        Py_END_ALLOW_THREADS;
    }
    return true;
}

// Whether the GPU's current stream is the one that writes the rows, and computes now.
bool gpu_ready(const GpuRows& gpu) {
    int64_t device, stream;
    if (gpu.device < 0 || !integer(Ref(PyObject_CallNoArgs(current_device)), device) || device != gpu.device)
        return false;
    const Ref index(PyLong_FromLongLong(gpu.device));
    return index && integer(Ref(PyObject_CallOneArg(current_stream, index.get())), stream) && stream == gpu.stream &&
           Ref(PyObject_CallNoArgs(is_capturing)).get() == Py_False;
}

// Has the GPU measure a tensor, behind all that it was told to do before: triton_kernels.measure_one.
bool launch(Table* table, const Leaf& leaf, int64_t& header) {
    GpuRows& gpu = table->gpu;
    const Launch& how = leaf.part->launch;
    const int64_t known = seen_before(table, leaf);
    if (known >= 0) {
        header = gpu.headers[known];
        return true;
    }
    if (gpu.used + how.parts + 1 > gpu.room) return false;
    header = gpu.used;
    gpu.used += how.parts + 1;
    void* tensor = leaf.address;
    int64_t numbers[] = {leaf.count,     how.each,       how.parts,      header,         0,             how.layout[0],
                         how.layout[1], how.layout[2], how.layout[3], how.layout[4], how.layout[5], how.layout[6]};
    int64_t meaning = how.meaning, rows = gpu.address, null = 0;
    std::vector<void*> parameters{&tensor};
    if (meaning) parameters.push_back(&meaning);
    parameters.push_back(&rows);
    for (int64_t& number : numbers) parameters.push_back(&number);
    for (int64_t at = 0; at < how.nulls; at++) parameters.push_back(&null);
    return !cu_launch_kernel(reinterpret_cast<void*>(how.function), how.parts, 1, 1, how.threads, 1, 1, how.shared,
                             reinterpret_cast<void*>(gpu.stream), parameters.data(), nullptr);
}

// While there is one, no function mode sees what is asked of tensors. False where that can't be had.
class Unseen {
  public:
    Unseen() {
        int64_t modes;
        fine = integer(Ref(PyObject_CallNoArgs(modes_on)), modes);
        if (fine && modes) hidden = Ref(PyObject_CallNoArgs(disable_modes));
        if (hidden) entered = Ref(PyObject_CallMethodNoArgs(hidden.get(), names.enter));
        fine = fine && (!modes || entered);
    }
    ~Unseen() {
        if (!entered) return;
        PyObject *type, *value, *traceback;
        PyErr_Fetch(&type, &value, &traceback);
        Ref(PyObject_CallMethodObjArgs(hidden.get(), names.exit, Py_None, Py_None, Py_None, nullptr));
        PyErr_Restore(type, value, traceback);
    }
    explicit operator bool() const { return fine; }

  private:
    bool fine = false;
    Ref hidden, entered;
};

// Measures the tensors in `values` if they are like those that `likeness` is of: see likeness.Likeness.
bool measure(Table* table, PyObject* likeness, PyObject* values) {
    const Unseen unseen;
    if (!unseen) return false;
    Match match(reinterpret_cast<Pattern*>(PyTuple_GET_ITEM(likeness, 0))->parts);
    if (!match.whole(values)) return false;
    const std::vector<Leaf>& leaves = match.leaves;
    const bool on_gpu = !leaves.empty() && leaves[0].part->kind == ON_GPU;
    if (on_gpu && !gpu_ready(table->gpu)) return false;
    std::vector<Row> rows(on_gpu ? 0 : leaves.size());
    std::vector<int64_t> headers(on_gpu ? leaves.size() : 0);
    for (size_t at = 0; at < leaves.size(); at++)
        if (!(on_gpu ? launch(table, leaves[at], headers[at]) : read(table, leaves[at], &rows[at]))) return false;
    const size_t first = on_gpu ? table->gpu.headers.size() : table->rows.size();
    if (!leaves.empty()) table->calls.push_back({Ref::shared(likeness), first});
    table->rows.insert(table->rows.end(), rows.begin(), rows.end());
    table->gpu.headers.insert(table->gpu.headers.end(), headers.begin(), headers.end());
    for (size_t at = 0; at < leaves.size(); at++)
        if (leaves[at].count * leaves[at].part->size >= WORTH_REMEMBERING) remember(table, leaves[at].tensor, first + at);
    return true;
}

// The end of what serves the model's own calls: whatever went wrong, they are described anew.
PyObject* unlike() {
    PyErr_Clear();
    return none();
}

PyObject* attach(PyObject* self, PyObject* arguments) {
    GpuRows& gpu = reinterpret_cast<Table*>(self)->gpu;
    long long device, stream, address, room;
    if (!PyArg_ParseTuple(arguments, "LLLL", &device, &stream, &address, &room)) return nullptr;
    gpu.device = device;
    gpu.stream = stream;
    gpu.address = address;
    gpu.room = room;
    return none();
}

PyObject* headers(PyObject* self, PyObject*) {
    const std::vector<int64_t>& all = reinterpret_cast<Table*>(self)->gpu.headers;
    return PyBytes_FromStringAndSize(reinterpret_cast<const char*>(all.data()), all.size() * sizeof all[0]);
}

PyObject* used(PyObject* self, PyObject*) { return PyLong_FromLongLong(reinterpret_cast<Table*>(self)->gpu.used); }

PyObject* contents(PyObject* self, PyObject*) {
    const std::vector<Row>& rows = reinterpret_cast<Table*>(self)->rows;
    return PyBytes_FromStringAndSize(reinterpret_cast<const char*>(rows.data()), rows.size() * sizeof(Row));
}

PyObject* new_table(PyTypeObject* type, PyObject* arguments, PyObject*) {
    int without_gradients;
    PyObject* weights;
    if (!PyArg_ParseTuple(arguments, "pO", &without_gradients, &weights)) return nullptr;
    Table* self = reinterpret_cast<Table*>(type->tp_alloc(type, 0));
    if (!self) return nullptr;
    new (&self->gpu) GpuRows();
    self->without_gradients = without_gradients;
    self->weights_stand = true;
    new (&self->weights) Ref(weights == Py_None ? nullptr : Ref::shared(weights).release());
    new (&self->calls) std::vector<Measured>();
    new (&self->rows) std::vector<Row>();
    new (&self->seen) std::unordered_map<PyObject*, Seen>();
    return reinterpret_cast<PyObject*>(self);
}

void delete_table(PyObject* self) {
    Table* table = reinterpret_cast<Table*>(self);
    table->gpu.~GpuRows();
    table->weights.~Ref();
    table->calls.~vector();
    table->rows.~vector();
    table->seen.~unordered_map();
    Py_TYPE(self)->tp_free(self);
}

int instruction(PyFrameObject* frame) {
#if PY_VERSION_HEX >= 0x030B0000
    return PyFrame_GetLasti(frame);
#else
    int64_t found = -1;
    integer(Ref(PyObject_GetAttrString(reinterpret_cast<PyObject*>(frame), "f_lasti")), found);
    return static_cast<int>(found);
#endif
}

// Code objects and instructions of the frames from `frame` up to but without `end`; false where that is not among them.
bool walk(Ref frame, PyObject* end, std::vector<int64_t>& key) {
    while (frame && frame.get() != end) {
        PyFrameObject* at = reinterpret_cast<PyFrameObject*>(frame.get());
        const Ref code(reinterpret_cast<PyObject*>(PyFrame_GetCode(at)));
        key.push_back(reinterpret_cast<intptr_t>(code.get()));
        key.push_back(instruction(at));
        frame = Ref(reinterpret_cast<PyObject*>(PyFrame_GetBack(at)));
    }
    return frame || end == Py_None;
}

PyObject* stack_key(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
    if (count != 2 || !PyFrame_Check(arguments[0])) {
        PyErr_SetString(PyExc_TypeError, "stack_key takes a frame and where to end");
        return nullptr;
    }
    std::vector<int64_t> key;
    if (!walk(Ref::shared(arguments[0]), arguments[1], key)) Py_RETURN_NONE;
    return PyBytes_FromStringAndSize(reinterpret_cast<const char*>(key.data()), key.size() * sizeof key[0]);
}

// The fields of likeness.EarlierCall.
enum Earlier { ENTRY, INPUTS, OUTPUTS, ANCHOR, CALL };

bool equal(PyObject* one, PyObject* other) {
    return one == other || (one && other && PyObject_RichCompareBool(one, other, Py_EQ) == 1);
}

// Whether `earlier` was called from the same place: in the same module's call, and over the same frames from there.
bool same_place(PyObject* earlier, PyObject* inside, const Ref& frame) {
    PyObject* const known = PyTuple_GET_ITEM(earlier, ANCHOR);
    if (known == Py_None) return true;  // stacks are not wanted
    Ref stack = Ref::shared(Py_None), end = Ref::shared(Py_None);
    if (inside) {
        const Ref anchor(PyObject_GetAttr(inside, names.anchor));
        if (!anchor) return false;
        stack = Ref(PyObject_GetAttr(anchor.get(), names.stack));
        end = Ref(PyObject_GetAttr(anchor.get(), names.frame));
    }
    const Ref outer(PyObject_GetAttr(known, names.outer)), walked(PyObject_GetAttr(known, names.walk));
    if (outer.get() != stack.get() || !walked || !PyBytes_Check(walked.get())) return false;
    std::vector<int64_t> key;
    return walk(Ref::shared(frame.get()), end.get(), key) &&
           PyBytes_GET_SIZE(walked.get()) == static_cast<Py_ssize_t>(key.size() * sizeof key[0]) &&
           !std::memcmp(PyBytes_AS_STRING(walked.get()), key.data(), key.size() * sizeof key[0]);
}

// Whether a call inside of the running module call `inside` is in the module, and has the parent, of an entry.
bool same_module(PyObject* entry, PyObject* inside, bool is_module) {
    const Ref parent(PyObject_GetAttr(entry, names.parent));
    const Ref name = inside ? Ref(PyObject_GetAttr(inside, names.name)) : Ref::shared(Py_None);
    if (!equal(parent.get(), name.get())) return false;
    if (is_module) return true;  // whose own path it is
    const Ref module(PyObject_GetAttr(entry, names.module));
    const Ref path = inside ? Ref(PyObject_GetAttr(inside, names.path)) : Ref::shared(Py_None);
    return equal(module.get(), path.get());
}

// The next number in `numbers` of `key`, which is 0 where there is none; -1 with an exception set.
int64_t next_number(PyObject* numbers, PyObject* key) {
    PyObject* const number = PyDict_GetItemWithError(numbers, key);
    if (number) return PyLong_AsLongLong(number);
    return PyErr_Occurred() ? -1 : 0;
}

bool count_on(PyObject* numbers, PyObject* key, int64_t number) {
    const Ref next(PyLong_FromLongLong(number + 1));
    return next && !PyDict_SetItem(numbers, key, next.get());
}

// The module call begins, and is from now on the innermost of those that run.
bool push(PyObject* call, PyObject* stack, const Ref& frame) {
    PyObject *type, *value, *traceback;
    PyErr_GetExcInfo(&type, &value, &traceback);
    const Ref types(type), handled(value ? value : none()), traces(traceback);
    const Ref anchor(PyObject_GetAttr(call, names.anchor));
    return anchor && (anchor.get() == Py_None || !PyObject_SetAttr(anchor.get(), names.frame, frame.get())) &&
           !PyObject_SetAttr(call, names.before, handled.get()) && !PyList_Append(stack, call);
}

bool gradients() { return Ref(PyObject_CallNoArgs(is_grad_enabled)).get() != Py_False; }

bool usable(Table* table) {
    if (table->weights) table->weights_stand = stand(reinterpret_cast<Probes*>(table->weights.get()));
    table->weights = Ref();
    return table->weights_stand && !(table->without_gradients && gradients());
}

PyObject* begin(PyObject* self, PyObject* const* arguments, Py_ssize_t count) {
    if (count != 6) {
        PyErr_SetString(PyExc_TypeError, "begin takes numbers, numbers within, a stack, a name, earlier calls, values");
        return nullptr;
    }
    PyObject *const numbers = arguments[0], *const within = arguments[1], *const stack = arguments[2];
    PyObject *const name = arguments[3], *const given = arguments[5];
    const int64_t number = next_number(numbers, name);
    const Ref key(PyLong_FromLongLong(number));
    PyObject* const earlier = key ? PyDict_GetItemWithError(arguments[4], key.get()) : nullptr;
    if (!earlier) return unlike();
    const Ref keep = Ref::shared(earlier);
    const Py_ssize_t depth = PyList_GET_SIZE(stack);
    PyObject* const inside = depth ? PyList_GET_ITEM(stack, depth - 1) : nullptr;
    PyObject* const entry = PyTuple_GET_ITEM(earlier, ENTRY);
    PyObject* const call = PyTuple_GET_ITEM(earlier, CALL);
    const Ref frame(reinterpret_cast<PyObject*>(PyFrame_GetBack(PyEval_GetFrame())));
    bool like = frame && usable(reinterpret_cast<Table*>(self)) && same_module(entry, inside, call != Py_None) &&
                same_place(earlier, inside, frame);
    Ref place;
    int64_t number_within = 0;
    if (like && within != Py_None) {
        const Ref module(PyObject_GetAttr(entry, names.module)), expected(PyObject_GetAttr(entry, names.number));
        place = Ref(PyTuple_Pack(2, name, module.get()));
        number_within = place ? next_number(within, place.get()) : -1;
        like = expected && PyLong_AsLongLong(expected.get()) == number_within;
    }
    like = like && measure(reinterpret_cast<Table*>(self), PyTuple_GET_ITEM(earlier, INPUTS), given);
    const bool counted =
        like && count_on(numbers, name, number) && (!place || count_on(within, place.get(), number_within));
    if (!counted || (call != Py_None && !push(call, stack, frame))) return unlike();
    return Ref::shared(earlier).release();
}

PyObject* end(PyObject* self, PyObject* const* arguments, Py_ssize_t count) {
    if (count != 4) {
        PyErr_SetString(PyExc_TypeError, "end takes entries, an earlier call, what it returned and parameters");
        return nullptr;
    }
    PyObject *const entries = arguments[0], *const earlier = arguments[1], *const parameters = arguments[3];
    const Ref outputs = PyTuple_Check(arguments[2]) ? Ref::shared(arguments[2]) : Ref(PyTuple_Pack(1, arguments[2]));
    const Ref values(outputs ? PyTuple_Pack(2, outputs.get(), parameters) : nullptr);
    if (!values || !measure(reinterpret_cast<Table*>(self), PyTuple_GET_ITEM(earlier, OUTPUTS), values.get()))
        return unlike();
    PyObject* const entry = PyTuple_GET_ITEM(earlier, ENTRY);
    const Ref name(PyObject_GetAttr(entry, names.name));
    if (!name || PyDict_SetItem(entries, name.get(), entry)) return unlike();
    return Ref::shared(Py_True).release();
}

PyObject* calls(PyObject* self, PyObject*) {
    const std::vector<Measured>& all = reinterpret_cast<Table*>(self)->calls;
    Ref list(PyList_New(all.size()));
    for (size_t at = 0; list && at < all.size(); at++) {
        PyObject* const call = Py_BuildValue("(On)", all[at].likeness.get(), static_cast<Py_ssize_t>(all[at].row));
        if (!call) return nullptr;
        PyList_SET_ITEM(list.get(), at, call);
    }
    return list.release();
}

PyObject* set_up(PyObject*, PyObject* arguments) {
    unsigned long long dense_at, strided_at, fingerprint_at;
    if (!PyArg_ParseTuple(arguments, "KKKOOO", &dense_at, &strided_at, &fingerprint_at, &modes_on, &disable_modes,
                          &is_grad_enabled))
        return nullptr;
    for (PyObject* each : {modes_on, disable_modes, is_grad_enabled}) Py_INCREF(each);  // as long as the process lives
    fingerprint = reinterpret_cast<Fingerprint*>(fingerprint_at);
    dense = reinterpret_cast<Dense*>(dense_at);
    strided = reinterpret_cast<Strided*>(strided_at);
    Py_RETURN_NONE;
}

PyObject* launch_kernel(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
    long long function, shared, threads, nulls, grid, stream;
    if (count < 3 || !PyTuple_Check(arguments[0]) ||
        !PyArg_ParseTuple(arguments[0], "LLLL", &function, &shared, &threads, &nulls))
        return nullptr;
    grid = PyLong_AsLongLong(arguments[1]);
    stream = PyLong_AsLongLong(arguments[2]);
    std::vector<int64_t> values(count - 3 + nulls);
    std::vector<void*> parameters(values.size());
    for (Py_ssize_t at = 3; at < count; at++) values[at - 3] = PyLong_AsLongLong(arguments[at]);
    for (size_t at = 0; at < values.size(); at++) parameters[at] = &values[at];
    if (PyErr_Occurred()) return nullptr;
    const int code = cu_launch_kernel(reinterpret_cast<void*>(function), grid, 1, 1, threads, 1, 1, shared,
                                      reinterpret_cast<void*>(stream), parameters.data(), nullptr);
    return PyBool_FromLong(!code);
}

PyObject* set_up_gpu(PyObject*, PyObject* arguments) {
    unsigned long long launch_at;
    if (!PyArg_ParseTuple(arguments, "KOOO", &launch_at, &current_stream, &current_device, &is_capturing))
        return nullptr;
    for (PyObject* each : {current_stream, current_device, is_capturing}) Py_INCREF(each);
    cu_launch_kernel = reinterpret_cast<CuLaunchKernel*>(launch_at);
    return none();
}

PyCFunction fast(PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t)) {
    return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)(void)>(function));
}

// What they do stands in likeness.py.
PyMethodDef table_methods[] = {
    {"begin", fast(begin), METH_FASTCALL, nullptr},
    {"end", fast(end), METH_FASTCALL, nullptr},
    {"attach", attach, METH_VARARGS, nullptr},
    {"calls", calls, METH_NOARGS, nullptr},
    {"headers", headers, METH_NOARGS, nullptr},
    {"used", used, METH_NOARGS, nullptr},
    {"contents", contents, METH_NOARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

PyMethodDef functions[] = {
    {"set_up", set_up, METH_VARARGS, nullptr},
    {"launch", fast(launch_kernel), METH_FASTCALL, nullptr},
    {"set_up_gpu", set_up_gpu, METH_VARARGS, nullptr},
    {"stack_key", fast(stack_key), METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

PyTypeObject pattern_type = {PyVarObject_HEAD_INIT(nullptr, 0)};
PyTypeObject table_type = {PyVarObject_HEAD_INIT(nullptr, 0)};
PyTypeObject probes_type = {PyVarObject_HEAD_INIT(nullptr, 0)};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_pattern", nullptr, -1, functions, nullptr, nullptr, nullptr, nullptr};

bool add_type(PyObject* to, PyTypeObject& type, const char* name, size_t size, newfunc make, destructor end) {
    type.tp_name = name;
    type.tp_basicsize = size;
    type.tp_flags = Py_TPFLAGS_DEFAULT;
    type.tp_new = make;
    type.tp_dealloc = end;
    return PyModule_AddType(to, &type) == 0;
}

}  // namespace

PyMODINIT_FUNC PyInit__pattern(void) {
    const struct {
        PyObject** at;
        const char* name;
    } needed[] = {{&names.dtype, "dtype"},
                  {&names.shape, "shape"},
                  {&names.requires_grad, "requires_grad"},
                  {&names.is_cpu, "is_cpu"},
                  {&names.is_contiguous, "is_contiguous"},
                  {&names.is_neg, "is_neg"},
                  {&names.data_ptr, "data_ptr"},
                  {&names.stride, "stride"},
                  {&names.version, "_version"},
                  {&names.get_device, "get_device"},
                  {&names.is_inference, "is_inference"},
                  {&names.anchor, "anchor"},
                  {&names.before, "before"},
                  {&names.enter, "__enter__"},
                  {&names.exit, "__exit__"},
                  {&names.frame, "frame"},
                  {&names.module, "module"},
                  {&names.name, "name"},
                  {&names.number, "number"},
                  {&names.outer, "outer"},
                  {&names.parent, "parent"},
                  {&names.path, "path"},
                  {&names.stack, "stack"},
                  {&names.walk, "walk"}};
    for (const auto& each : needed) *each.at = PyUnicode_InternFromString(each.name);
    Ref made(PyModule_Create(&module));
    table_type.tp_methods = table_methods;
    if (!made || !add_type(made.get(), pattern_type, "_pattern.Pattern", sizeof(Pattern), new_pattern, delete_pattern) ||
        !add_type(made.get(), table_type, "_pattern.Table", sizeof(Table), new_table, delete_table) ||
        !add_type(made.get(), probes_type, "_pattern.Probes", sizeof(Probes), new_probes, delete_probes))
        return nullptr;
    Py_INCREF(made.get());
    return made.get();
}
