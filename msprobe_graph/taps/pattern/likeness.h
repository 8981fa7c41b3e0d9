#pragma once

// What values are to be like, and whether others are: `Pattern`, for likeness.py.

#include <algorithm>
#include <cstring>
#include <memory>
#include <new>

#include "exchange.h"

namespace {

constexpr int64_t MAPPED = int64_t(1) << 40;  // see unmeasurable.py

// The order is that of likeness.Kind.
enum Kind { TENSOR, WEIGHT, EQUAL, TYPE, ITEMS, KEYS, FIELDS, ON_GPU, FORM };

// How a tensor on a GPU is measured: see launches.Launch.
struct Launch {
    long long function, shared, threads, nulls, meaning, parts, each, alignment;
    long long layout[7];
};

struct Part {
    Kind kind;
    Ref type;
    Ref object;  // WEIGHT: a weak reference to it; EQUAL: the value; KEYS, FIELDS: a tuple of names
    int64_t size = 0;  // ITEMS: how many
    int32_t code = 0;
    bool of_tensor = false;
    // Of tensors:
    bool requires_grad = false;
    DLDataType dtype{};
    DLDevice device{};
    std::vector<int64_t> shape, strides;
    int64_t version = 0;
    void* address = nullptr;
    std::unique_ptr<Launch> launch;  // ON_GPU; apart, so that the parts, which are read between a model's kernels, are small
};

struct Leaf {
    Ref tensor;
    const Part* part;
    DLTensor seen;  // as long as nothing of the program's has run since
    int64_t count;
    bool contiguous;

    int64_t element_size() const { return seen.dtype.bits / 8; }
};

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
        if (part.kind == WEIGHT) return value == PyWeakref_GetObject(part.object.get()) && unchanged(part, value);
        if (part.kind == EQUAL && value == part.object.get()) return true;
        if ((PyObject*)Py_TYPE(value) != part.type.get()) return false;
        switch (part.kind) {
            case TENSOR:
                return tensor(part, value);
            case ON_GPU:
                return on_gpu(part, value);
            case FORM: {
                DLTensor seen;
                return same_form(part, value, seen);
            }
            case EQUAL:
                if (PyFloat_CheckExact(value)) return same_float(value, part.object.get());
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

    static bool same_form(const Part& part, PyObject* value, DLTensor& seen) {
        return look(value, seen) && seen.dtype == part.dtype && same(seen.shape, seen.dims, part.shape) &&
               same_attribute(value, names.requires_grad, part.requires_grad ? Py_True : Py_False);
    }

    static bool same(const int64_t* found, int32_t count, const std::vector<int64_t>& expected) {
        return static_cast<size_t>(count) == expected.size() && std::equal(found, found + count, expected.begin());
    }

    static bool unchanged(const Part& part, PyObject* value) {
        DLTensor seen;
        int64_t version;
        return same_form(part, value, seen) && seen.data == part.address &&
               integer(Ref(PyObject_GetAttr(value, names.version)), version) && version == part.version;
    }

    // Whether there are values: the "address" of a tensor whose storage was freed is where in that it began.
    static bool there(PyObject* value, const DLTensor& seen) {
        const int64_t address = reinterpret_cast<int64_t>(seen.data);
        if (address >= MAPPED) return true;
        int64_t offset;
        return address && integer(called(value, names.storage_offset), offset) &&
               address != offset * (seen.dtype.bits / 8);
    }

    // Only part of a complex tensor's memory can be marked as negative: with two elements or more it is no run.
    bool take(const Part& part, PyObject* value, const DLTensor& seen) {
        const int64_t count = elements(seen);
        if (count && !there(value, seen)) return false;
        const bool run = count > 1 && contiguous(seen);
        if (!run && called(value, names.is_neg).get() != Py_False) return false;
        leaves.push_back({Ref::shared(value), &part, seen, count, run});
        return true;
    }

    bool on_gpu(const Part& part, PyObject* value) {
        DLTensor seen;
        if (!same_form(part, value, seen)) return false;
        return seen.device == part.device && same(seen.strides, seen.dims, part.strides) &&
               reinterpret_cast<int64_t>(seen.data) % part.launch->alignment == 0 && take(part, value, seen);
    }

    bool tensor(const Part& part, PyObject* value) {
        DLTensor seen;
        return same_form(part, value, seen) && seen.device.type == CPU && take(part, value, seen);
    }

    // Of the two zeros each is like itself only.
    static bool same_float(PyObject* one, PyObject* other) {
        const double values[] = {PyFloat_AS_DOUBLE(one), PyFloat_AS_DOUBLE(other)};
        return !std::memcmp(values, values + 1, sizeof values[0]);
    }

    bool items(const Part& part, PyObject* value) {
        const bool tuple = PyTuple_Check(value);
        if (!tuple && !PyList_Check(value)) return false;
        if ((tuple ? PyTuple_GET_SIZE(value) : PyList_GET_SIZE(value)) != part.size) return false;
        for (int64_t index = 0; index < part.size; index++) {
            if (!tuple && index >= PyList_GET_SIZE(value)) return false;  // a comparison may run code that shortens it
            const Ref item = Ref::shared(tuple ? PyTuple_GET_ITEM(value, index) : PyList_GET_ITEM(value, index));
            if (!like(item.get())) return false;
        }
        return true;
    }

    bool keys(const Part& part, PyObject* value) {
        const Py_ssize_t count = PyTuple_GET_SIZE(part.object.get());
        if (!PyDict_Check(value) || PyDict_GET_SIZE(value) != count) return false;
        for (Py_ssize_t index = 0; index < count; index++) {
            const Ref item = Ref::shared(PyDict_GetItemWithError(value, PyTuple_GET_ITEM(part.object.get(), index)));
            if (!like(item.get())) return false;
        }
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
    bool overrides;  // there are tensors of classes that do
};

bool read_launch(PyObject* given, Launch& to) {
    return PyArg_ParseTuple(given, "LLLLLLLL(LLLLLLL)", &to.function, &to.shared, &to.threads, &to.nulls, &to.meaning,
                            &to.parts, &to.each, &to.alignment, to.layout, to.layout + 1, to.layout + 2, to.layout + 3,
                            to.layout + 4, to.layout + 5, to.layout + 6);
}

// What is to be like `tensor`, as it is now. BufferError where it has no memory of its own.
bool read_tensor(PyObject* tensor, Part& part) {
    DLTensor seen;
    if (!look(tensor, seen)) {
        PyErr_SetString(PyExc_BufferError, "a tensor can't be looked at");
        return false;
    }
    part.of_tensor = true;
    part.requires_grad = Ref(PyObject_GetAttr(tensor, names.requires_grad)).get() == Py_True;
    part.dtype = seen.dtype;
    part.device = seen.device;
    part.shape.assign(seen.shape, seen.shape + seen.dims);
    part.strides.assign(seen.strides, seen.strides + seen.dims);
    part.address = seen.data;
    return part.kind != WEIGHT || integer(Ref(PyObject_GetAttr(tensor, names.version)), part.version);
}

bool read_part(PyObject* given, Part& part) {
    int kind, code;
    long long size;
    PyObject *type, *object, *tensor, *launch;
    if (!PyArg_ParseTuple(given, "iOOLiOO", &kind, &type, &object, &size, &code, &tensor, &launch)) return false;
    part.kind = static_cast<Kind>(kind);
    part.type = Ref::shared(type);
    part.object = Ref::shared(object);
    part.size = size;
    part.code = code;
    if (tensor != Py_None && !read_tensor(tensor, part)) return false;
    if (launch == Py_None) return true;
    part.launch = std::make_unique<Launch>();
    return read_launch(launch, *part.launch);
}

PyObject* new_pattern(PyTypeObject* type, PyObject* arguments, PyObject*) {
    PyObject* given;
    if (!PyArg_ParseTuple(arguments, "O!", &PyList_Type, &given)) return nullptr;
    Pattern* self = reinterpret_cast<Pattern*>(type->tp_alloc(type, 0));
    if (!self) return nullptr;
    new (&self->parts) std::vector<Part>(PyList_GET_SIZE(given));
    const Unseen unseen(true);
    for (Py_ssize_t at = 0; at < PyList_GET_SIZE(given); at++) {
        Part& part = self->parts[at];
        if (!read_part(PyList_GET_ITEM(given, at), part)) {
            Py_DECREF(self);
            return nullptr;
        }
        self->overrides = self->overrides || (part.of_tensor && overrides(part.type.get()));
    }
    return reinterpret_cast<PyObject*>(self);
}

void delete_pattern(PyObject* self) {
    reinterpret_cast<Pattern*>(self)->parts.~vector();
    Py_TYPE(self)->tp_free(self);
}

}  // namespace
