#pragma once

// What values are to be like, and whether others are: `Pattern`, for likeness.py.

#include <cstring>
#include <memory>
#include <new>

#include "python.h"

namespace {

constexpr int64_t MAPPED = int64_t(1) << 40;   // see unmeasurable.py
constexpr int64_t OFFSETS = int64_t(1) << 30;  // below are the "addresses" of tensors whose storage a GPU has freed

// The order is that of likeness.Kind.
enum Kind { TENSOR, WEIGHT, EQUAL, TYPE, ITEMS, KEYS, FIELDS, ON_GPU, FORM };

// How a tensor on a GPU is measured: see launches.Launch.
struct Launch {
    long long device, function, shared, threads, nulls, meaning, parts, each, alignment;
    long long layout[7];
    std::vector<int64_t> strides;
};

struct Part {
    Kind kind;
    Ref type;
    Ref object;  // WEIGHT: a weak reference to it; EQUAL: the value; KEYS, FIELDS: a tuple of names
    Ref dtype;   // TENSOR, ON_GPU, WEIGHT, FORM
    int64_t size = 0;  // ITEMS: how many; TENSOR: bytes of an element
    int32_t code = 0;
    bool requires_grad = false;
    std::vector<int64_t> shape;
    int64_t version = 0;
    int64_t address = 0;
    std::unique_ptr<Launch> launch;  // ON_GPU; apart, so that the parts, which are read between a model's kernels, are small

    int64_t count() const {
        int64_t count = 1;
        for (int64_t size : shape) count *= size;
        return count;
    }
};

struct Leaf {
    Ref tensor;
    const Part* part;
    void* address;
    int64_t count;
    bool contiguous;
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
            case FORM:
                return same_form(part, value);
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
            device != part.launch->device || !same_numbers(called(value, names.stride), part.launch->strides) ||
            !integer(called(value, names.data_ptr), address) || address < OFFSETS ||
            address % part.launch->alignment ||
            called(value, names.is_neg).get() != Py_False)
            return false;
        leaves.push_back({Ref::shared(value), &part, reinterpret_cast<void*>(address), part.count(), true});
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
        leaves.push_back({Ref::shared(value), &part, reinterpret_cast<void*>(address), count, run});
        return true;
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
    if (launch != Py_None) {
        part.launch = std::make_unique<Launch>();
        Launch& to = *part.launch;
        for (Py_ssize_t at = 0; at < PyTuple_GET_SIZE(strides); at++)
            to.strides.push_back(PyLong_AsLongLong(PyTuple_GET_ITEM(strides, at)));
        if (!PyArg_ParseTuple(launch, "LLLLLLLLL(LLLLLLL)", &to.device, &to.function, &to.shared, &to.threads,
                              &to.nulls, &to.meaning, &to.parts, &to.each, &to.alignment, to.layout, to.layout + 1,
                              to.layout + 2, to.layout + 3, to.layout + 4, to.layout + 5, to.layout + 6))
            return false;
    }
    if (part.kind == WEIGHT) {
        const Ref weight = Ref::shared(PyWeakref_GetObject(object));
        return weight && integer(Ref(PyObject_GetAttr(weight.get(), names.version)), part.version) &&
               integer(called(weight.get(), names.data_ptr), part.address);
    }
    return !PyErr_Occurred();
}

PyObject* new_pattern(PyTypeObject* type, PyObject* arguments, PyObject*) {
    PyObject* given;
    if (!PyArg_ParseTuple(arguments, "O!", &PyList_Type, &given)) return nullptr;
    Pattern* self = reinterpret_cast<Pattern*>(type->tp_alloc(type, 0));
    if (!self) return nullptr;
    new (&self->parts) std::vector<Part>(PyList_GET_SIZE(given));
    for (Py_ssize_t at = 0; at < PyList_GET_SIZE(given); at++) {
        Part& part = self->parts[at];
        if (!read_part(PyList_GET_ITEM(given, at), part)) {
            Py_DECREF(self);
            return nullptr;
        }
        self->overrides = self->overrides || (part.dtype.get() != Py_None && overrides(part.type.get()));
    }
    return reinterpret_cast<PyObject*>(self);
}

void delete_pattern(PyObject* self) {
    reinterpret_cast<Pattern*>(self)->parts.~vector();
    Py_TYPE(self)->tp_free(self);
}

}  // namespace
