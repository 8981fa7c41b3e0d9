// Calls like those of earlier steps, checked and measured without Python's own code: what likeness.py declares.
//
// A Python extension that knows torch by its Python face alone (attributes and methods of tensors), so that it fits
// every version. It is optional: without it each call is described anew.

#include "calls.h"
#include "versions.h"

namespace {

PyObject* attach(PyObject* self, PyObject* arguments) {
    GpuRows& gpu = reinterpret_cast<Table*>(self)->gpu;
    long long device, stream, address, room;
    if (!PyArg_ParseTuple(arguments, "LLLL", &device, &stream, &address, &room)) return nullptr;
    gpu.device = device;
    gpu.stream = reinterpret_cast<void*>(stream);
    gpu.address = address;
    gpu.room = room;
    return none();
}

PyObject* headers(PyObject* self, PyObject*) {
    const std::vector<int64_t>& all = reinterpret_cast<Table*>(self)->gpu.headers;
    return PyBytes_FromStringAndSize(reinterpret_cast<const char*>(all.data()), all.size() * sizeof all[0]);
}

PyObject* ran_out(PyObject* self, PyObject*) { return PyBool_FromLong(reinterpret_cast<Table*>(self)->gpu.ran_out); }

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

PyObject* calls(PyObject* self, PyObject*) {
    const std::vector<Measured>& all = reinterpret_cast<Table*>(self)->calls;
    Ref list(PyList_New(all.size()));
    for (size_t at = 0; list && at < all.size(); at++) {
        PyObject* const call = Py_BuildValue("(Onn)", all[at].likeness.get(), static_cast<Py_ssize_t>(all[at].row),
                                             static_cast<Py_ssize_t>(all[at].gpu_row));
        if (!call) return nullptr;
        PyList_SET_ITEM(list.get(), at, call);
    }
    return list.release();
}

PyObject* set_up(PyObject*, PyObject* arguments) {
    unsigned long long dense_at, strided_at, fingerprint_at;
    PyObject* dlpack;
    if (!PyArg_ParseTuple(arguments, "KKKOOOOO", &dense_at, &strided_at, &fingerprint_at, &dlpack, &modes_on,
                          &disable_modes, &no_torch_function, &is_grad_enabled) ||
        !set_up_exchange(dlpack))
        return nullptr;
    for (PyObject* each : {modes_on, disable_modes, no_torch_function, is_grad_enabled})
        Py_INCREF(each);  // as long as the process lives
    fingerprint = reinterpret_cast<Fingerprint*>(fingerprint_at);
    dense = reinterpret_cast<Dense*>(dense_at);
    strided = reinterpret_cast<Strided*>(strided_at);
    return none();
}

PyObject* launch_kernel(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
    long long function, shared, threads, nulls, grid, stream;
    if (count < 3 || !PyTuple_Check(arguments[0])) {
        PyErr_SetString(PyExc_TypeError, "launch takes a kernel, a grid, a stream and parameters");
        return nullptr;
    }
    if (!PyArg_ParseTuple(arguments[0], "LLLL", &function, &shared, &threads, &nulls))
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
    if (!PyArg_ParseTuple(arguments, "KOO", &launch_at, &current_device, &is_capturing)) return nullptr;
    for (PyObject* each : {current_device, is_capturing}) Py_INCREF(each);
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
    {"measure", fast(measure_values), METH_FASTCALL, nullptr},
    {"attach", attach, METH_VARARGS, nullptr},
    {"calls", calls, METH_NOARGS, nullptr},
    {"headers", headers, METH_NOARGS, nullptr},
    {"ran_out", ran_out, METH_NOARGS, nullptr},
    {"contents", contents, METH_NOARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

PyMethodDef versions_methods[] = {
    {"stand", versions_stand, METH_NOARGS, nullptr},
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
PyTypeObject versions_type = {PyVarObject_HEAD_INIT(nullptr, 0)};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_pattern", nullptr, -1, functions, nullptr, nullptr, nullptr, nullptr};

bool add_type(PyObject* to, PyTypeObject& type, const char* name, size_t size, newfunc make, destructor end) {
    type.tp_name = name;
    type.tp_basicsize = size;
    type.tp_flags = Py_TPFLAGS_DEFAULT | (type.tp_traverse ? Py_TPFLAGS_HAVE_GC : 0);
    type.tp_new = make;
    type.tp_dealloc = end;
    return PyModule_AddType(to, &type) == 0;
}

}  // namespace

PyMODINIT_FUNC PyInit__pattern(void) {
    make_names();
    Ref made(PyModule_Create(&module));
    table_type.tp_methods = table_methods;
    versions_type.tp_methods = versions_methods;
    versions_type.tp_traverse = visit_versions;
    versions_type.tp_clear = clear_versions;
    if (!made || !add_type(made.get(), pattern_type, "_pattern.Pattern", sizeof(Pattern), new_pattern, delete_pattern) ||
        !add_type(made.get(), table_type, "_pattern.Table", sizeof(Table), new_table, delete_table) ||
        !add_type(made.get(), probes_type, "_pattern.Probes", sizeof(Probes), new_probes, delete_probes) ||
        !add_type(made.get(), versions_type, "_pattern.Versions", sizeof(Versions), new_versions, delete_versions))
        return nullptr;
    return made.release();
}
