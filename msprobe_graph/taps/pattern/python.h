#pragma once

// Python's objects, owned, and the names by which they are asked.

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstdint>
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
    PyObject *requires_grad, *is_neg, *data_ptr, *storage_offset, *version;
    PyObject *is_inference, *numel, *enter, *exit, *torch_function;
    PyObject *anchor, *before, *frame, *module, *name, *number, *outer, *parent, *path, *stack, *walk;
} names;

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

// The end of what serves the model's own calls: whatever went wrong, they are described anew.
PyObject* unlike() {
    PyErr_Clear();
    return none();
}

void make_names() {
    const struct {
        PyObject** at;
        const char* name;
    } needed[] = {{&names.requires_grad, "requires_grad"},
                  {&names.is_neg, "is_neg"},
                  {&names.data_ptr, "data_ptr"},
                  {&names.storage_offset, "storage_offset"},
                  {&names.version, "_version"},
                  {&names.numel, "numel"},
                  {&names.is_inference, "is_inference"},
                  {&names.anchor, "anchor"},
                  {&names.before, "before"},
                  {&names.enter, "__enter__"},
                  {&names.exit, "__exit__"},
                  {&names.torch_function, "__torch_function__"},
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
}

// torch's own: how many function modes are on, the context that hides from them and from the tensors' own classes, what
// a class has for __torch_function__ where it leaves everything to torch, and whether gradients are recorded.
PyObject *modes_on, *disable_modes, *no_torch_function, *is_grad_enabled;

// Whether tensors of that class are asked through Python code of its own.
bool overrides(PyObject* type) {
    const Ref handler(PyObject_GetAttr(type, names.torch_function));
    PyErr_Clear();
    return handler && handler.get() != no_torch_function;
}

// While there is one, no function mode sees what is asked of tensors, and no class that `overrides` if there may be
// `classes` that do. False where that can't be had.
class Unseen {
  public:
    explicit Unseen(bool classes) {
        int64_t modes;
        fine = integer(Ref(PyObject_CallNoArgs(modes_on)), modes);
        const bool wanted = modes || classes;
        if (fine && wanted) hidden = Ref(PyObject_CallNoArgs(disable_modes));
        if (hidden) entered = Ref(PyObject_CallMethodNoArgs(hidden.get(), names.enter));
        fine = fine && (!wanted || entered);
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

}  // namespace
