#pragma once

// Whether weights were written to, though their version counters stand still: `Probes`, for measured.py.

#include <new>

#include "python.h"

namespace {

typedef uint64_t Fingerprint(const void* data, int64_t count, int64_t size);
Fingerprint* fingerprint;

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
        int64_t address, count;
        const bool there = tensor && tensor != Py_None && integer(called(tensor, names.data_ptr), address) &&
                           address == probe.address && integer(called(tensor, names.numel), count) &&
                           count == probe.count;
        if (!there || fingerprint(reinterpret_cast<void*>(address), probe.count, probe.size) != probe.fingerprint) {
            PyErr_Clear();
            return false;
        }
    }
    return true;
}

}  // namespace
