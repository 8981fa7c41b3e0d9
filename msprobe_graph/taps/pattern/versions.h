#pragma once

// Whether the version counters of tensors stand where they did: `Versions`, for versions.py.

#include "python.h"

namespace {

struct Version {
    Ref tensor;
    int64_t counted;
};

struct Versions {
    PyObject_HEAD
    Ref counter;  // the descriptor of torch's tensors' _version: to ask it costs a fifth of what an attribute does
    std::vector<Version> each;
};

bool count_version(const Versions* self, PyObject* tensor, int64_t& counted) {
    PyObject* const type = reinterpret_cast<PyObject*>(Py_TYPE(tensor));
    return integer(Ref(Py_TYPE(self->counter.get())->tp_descr_get(self->counter.get(), tensor, type)), counted);
}

PyObject* new_versions(PyTypeObject* type, PyObject* arguments, PyObject*) {
    PyObject *counter, *tensors;
    if (!PyArg_ParseTuple(arguments, "OO!", &counter, &PyList_Type, &tensors)) return nullptr;
    if (!Py_TYPE(counter)->tp_descr_get) {
        PyErr_SetString(PyExc_TypeError, "Versions takes the descriptor of an attribute and a list of tensors");
        return nullptr;
    }
    Versions* self = reinterpret_cast<Versions*>(type->tp_alloc(type, 0));
    if (!self) return nullptr;
    new (&self->counter) Ref(Ref::shared(counter));
    new (&self->each) std::vector<Version>(PyList_GET_SIZE(tensors));
    for (Py_ssize_t at = 0; at < PyList_GET_SIZE(tensors); at++) {
        Version& version = self->each[at];
        version.tensor = Ref::shared(PyList_GET_ITEM(tensors, at));
        if (!count_version(self, version.tensor.get(), version.counted)) {
            Py_DECREF(self);
            return nullptr;
        }
    }
    return reinterpret_cast<PyObject*>(self);
}

// The collector's: a parameter may refer to what leads back here.
int visit_versions(PyObject* self, visitproc visit, void* arg) {
    for (const Version& version : reinterpret_cast<Versions*>(self)->each) Py_VISIT(version.tensor.get());
    return 0;
}

int clear_versions(PyObject* self) {
    std::vector<Version> gone;
    gone.swap(reinterpret_cast<Versions*>(self)->each);
    return 0;
}

void delete_versions(PyObject* self) {
    PyObject_GC_UnTrack(self);
    Versions* versions = reinterpret_cast<Versions*>(self);
    versions->counter.~Ref();
    versions->each.~vector();
    Py_TYPE(self)->tp_free(self);
}

PyObject* versions_stand(PyObject* self, PyObject*) {
    const Versions* versions = reinterpret_cast<Versions*>(self);
    for (const Version& version : versions->each) {
        int64_t counted;
        if (!count_version(versions, version.tensor.get(), counted)) return nullptr;
        if (counted != version.counted) Py_RETURN_FALSE;
    }
    Py_RETURN_TRUE;
}

}  // namespace
