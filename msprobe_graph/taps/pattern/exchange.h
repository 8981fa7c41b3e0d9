#pragma once

// DLPack's C exchange API, as its dlpack.h declares it from version 1.3 on: what a tensor is and where it lies, without
// asking Python for each of it. torch offers it from 2.10 on, and it is part of no version's ABI.

#include "python.h"

namespace {

struct DLDevice {
    int32_t type, id;
};

struct DLDataType {
    uint8_t code, bits;
    uint16_t lanes;
};

struct DLTensor {
    void* data;  // of the first element, in torch's case
    DLDevice device;
    int32_t dims;
    DLDataType dtype;
    int64_t* shape;  // the tensor's own, as the strides are
    int64_t* strides;
    uint64_t byte_offset;
};

struct DLPackExchangeAPI {
    struct {
        uint32_t major, minor;
    } version;
    void *previous, *allocator, *from_object, *to_object;
    int (*look)(void* tensor, DLTensor* out);
    int (*current_stream)(int32_t device_type, int32_t device, void** stream);
};

constexpr int32_t CPU = 1;  // a device's type

const DLPackExchangeAPI* exchange;

// Whether the API is one that is known here.
bool set_up_exchange(PyObject* capsule) {
    exchange = static_cast<DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
    if (exchange && exchange->version.major == 1 && exchange->look && exchange->current_stream) return true;
    if (!PyErr_Occurred()) PyErr_SetString(PyExc_ImportError, "torch has another version of DLPack's exchange API");
    return false;
}

bool look(PyObject* tensor, DLTensor& out) { return !exchange->look(tensor, &out); }

bool operator==(const DLDataType& one, const DLDataType& other) {
    return one.code == other.code && one.bits == other.bits && one.lanes == other.lanes;
}

bool operator==(const DLDevice& one, const DLDevice& other) { return one.type == other.type && one.id == other.id; }

int64_t elements(const DLTensor& tensor) {
    int64_t count = 1;
    for (int32_t at = 0; at < tensor.dims; at++) count *= tensor.shape[at];
    return count;
}

// Whether the elements lie one behind the other.
bool contiguous(const DLTensor& tensor) {
    int64_t expected = 1;
    for (int32_t at = tensor.dims - 1; at >= 0; at--) {
        if (tensor.shape[at] != 1 && tensor.strides[at] != expected) return false;
        expected *= tensor.shape[at];
    }
    return true;
}

}  // namespace
