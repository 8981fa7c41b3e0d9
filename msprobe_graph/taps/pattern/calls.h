#pragma once

// Calls that begin and end like those of earlier steps: what Table.begin and Table.end do, as likeness.py says.

#include <cstring>

#include "rows.h"
#include "stacks.h"

namespace {

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
    if (table->weights) {
        const Unseen unseen(true);
        table->weights_stand = unseen && stand(reinterpret_cast<Probes*>(table->weights.get()));
        table->weights = Ref();
    }
    return table->weights_stand && !(table->without_gradients && gradients());
}

// A call that begins, as `begin` is told of it.
struct Beginning {
    PyObject *numbers, *within, *stack, *name, *given;
    int64_t number;
    Ref frame;
};

// Whether it begins like `earlier`; if so it is counted, and what it was given is measured.
bool begins_like(Table* table, PyObject* earlier, const Beginning& now) {
    const Py_ssize_t depth = PyList_GET_SIZE(now.stack);
    PyObject* const inside = depth ? PyList_GET_ITEM(now.stack, depth - 1) : nullptr;
    PyObject* const entry = PyTuple_GET_ITEM(earlier, ENTRY);
    PyObject* const call = PyTuple_GET_ITEM(earlier, CALL);
    if (!same_module(entry, inside, call != Py_None) || !same_place(earlier, inside, now.frame)) return false;
    Ref place;
    int64_t number_within = 0;
    if (now.within != Py_None) {
        const Ref module(PyObject_GetAttr(entry, names.module)), expected(PyObject_GetAttr(entry, names.number));
        place = Ref(PyTuple_Pack(2, now.name, module.get()));
        number_within = place ? next_number(now.within, place.get()) : -1;
        if (!expected || PyLong_AsLongLong(expected.get()) != number_within) return false;
    }
    return measure(table, PyTuple_GET_ITEM(earlier, INPUTS), now.given) &&
           count_on(now.numbers, now.name, now.number) &&
           (!place || count_on(now.within, place.get(), number_within)) &&
           (call == Py_None || push(call, now.stack, now.frame));
}

// What was seen last is looked at first.
void to_front(PyObject* list, Py_ssize_t at) {
    PyObject* const item = PyList_GET_ITEM(list, at);
    for (; at; at--) PyList_SET_ITEM(list, at, PyList_GET_ITEM(list, at - 1));
    PyList_SET_ITEM(list, 0, item);
}

PyObject* begin(PyObject* self, PyObject* const* arguments, Py_ssize_t count) {
    if (count != 6) {
        PyErr_SetString(PyExc_TypeError, "begin takes numbers, numbers within, a stack, a name, earlier calls, values");
        return nullptr;
    }
    Table* const table = reinterpret_cast<Table*>(self);
    const int64_t number = next_number(arguments[0], arguments[3]);
    const Ref key(PyLong_FromLongLong(number));
    const Ref forms = Ref::shared(key ? PyDict_GetItemWithError(arguments[4], key.get()) : nullptr);
    if (!forms || !PyList_Check(forms.get())) return unlike();
    const Beginning now{arguments[0], arguments[1], arguments[2], arguments[3], arguments[5], number,
                        Ref(reinterpret_cast<PyObject*>(PyFrame_GetBack(PyEval_GetFrame())))};
    if (!now.frame || !usable(table)) return unlike();
    for (Py_ssize_t at = 0; at < PyList_GET_SIZE(forms.get()); at++) {
        Ref earlier = Ref::shared(PyList_GET_ITEM(forms.get(), at));
        if (begins_like(table, earlier.get(), now)) {
            if (at && at < PyList_GET_SIZE(forms.get())) to_front(forms.get(), at);
            return earlier.release();
        }
        PyErr_Clear();
    }
    return unlike();
}

PyObject* end(PyObject* self, PyObject* const* arguments, Py_ssize_t count) {
    if (count != 4) {
        PyErr_SetString(PyExc_TypeError, "end takes entries, an earlier call, what it returned and parameters");
        return nullptr;
    }
    PyObject *const entries = arguments[0], *const earlier = arguments[1], *const parameters = arguments[3];
    const Ref outputs(PyTuple_Check(arguments[2]) ? PySequence_Tuple(arguments[2]) : PyTuple_Pack(1, arguments[2]));
    const Ref values(outputs ? PyTuple_Pack(2, outputs.get(), parameters) : nullptr);
    if (!values || !measure(reinterpret_cast<Table*>(self), PyTuple_GET_ITEM(earlier, OUTPUTS), values.get()))
        return unlike();
    PyObject* const entry = PyTuple_GET_ITEM(earlier, ENTRY);
    const Ref name(PyObject_GetAttr(entry, names.name));
    if (!name || PyDict_SetItem(entries, name.get(), entry)) return unlike();
    return Ref::shared(Py_True).release();
}

PyObject* measure_values(PyObject* self, PyObject* const* arguments, Py_ssize_t count) {
    if (count != 2 || !PyTuple_Check(arguments[0])) {
        PyErr_SetString(PyExc_TypeError, "measure takes a likeness and values");
        return nullptr;
    }
    Table* const table = reinterpret_cast<Table*>(self);
    const bool like = usable(table) && measure(table, arguments[0], arguments[1]);
    PyErr_Clear();
    return PyBool_FromLong(like);
}

}  // namespace
