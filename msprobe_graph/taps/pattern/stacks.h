#pragma once

// Call stacks, by which frames are known.

#include "python.h"

namespace {

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

}  // namespace
