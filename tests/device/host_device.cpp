// A device of the tests' own: PrivateUse1, whose memory is the host's and whose kernels are the CPU's. Nothing of CUDA is
// there, and nothing of what a kernel does can be seen by Python's dispatch modes, as on any device.
//
// While a graph is captured nothing is computed: calls are recorded, with the addresses that they are given, and what
// they return holds garbage. A replay calls them again on the same addresses, with no Python. Memory that is freed
// during a capture is used again later in the same capture, as in a graph's memory pool.

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/view_native.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/Contiguity.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <map>
#include <set>

namespace {

constexpr auto kOurs = c10::DeviceType::PrivateUse1;
const c10::Device kDevice(kOurs, 0);

// ---- graphs ---------------------------------------------------------------------------------------------------------

struct Call {
  c10::OperatorHandle* op = nullptr;  // none: a function of the host
  torch::jit::Stack given;
  std::vector<c10::IValue> gave;
  void (*host_function)() = nullptr;
};

struct Graph {
  std::vector<Call> calls;
  std::multimap<size_t, void*> free;
};

std::vector<std::unique_ptr<Graph>> graphs;
Graph* capturing = nullptr;
std::map<void*, std::pair<size_t, Graph*>> sizes;

// ---- memory ---------------------------------------------------------------------------------------------------------

void release(void* data) {
  auto [size, graph] = sizes.at(data);
  if (graph != nullptr) {
    graph->free.emplace(size, data);
  } else {
    sizes.erase(data);
    std::free(data);
  }
}

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes == 0) {
      return {nullptr, nullptr, &release, kDevice};
    }
    void* data = nullptr;
    if (capturing != nullptr) {
      auto found = capturing->free.lower_bound(bytes);
      if (found != capturing->free.end() && found->first < 4 * bytes) {
        data = found->second;
        capturing->free.erase(found);
      }
    }
    if (data == nullptr) {
      data = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
      sizes[data] = {bytes, capturing};
    }
    std::memset(data, 0x7f, bytes);
    return {data, data, &release, kDevice};
  }
  c10::DeleterFnPtr raw_deleter() const override {
    return &release;
  }
  void copy_data(void* to, const void* from, size_t count) const override {
    std::memcpy(to, from, count);
  }
};

Memory memory;

// ---- calls ----------------------------------------------------------------------------------------------------------

at::Tensor at_address(const at::Tensor& like, c10::Device device) {
  auto options = like.options().device(device);
  if (like.numel() == 0) {
    return at::empty_strided(like.sizes(), like.strides(), options);
  }
  return at::from_blob(like.data_ptr(), like.sizes(), like.strides(), options);
}

using Change = std::function<at::Tensor(const at::Tensor&)>;

c10::IValue changed(const c10::IValue& value, const Change& change) {
  if (value.isTensor() && value.toTensor().defined()) {
    return change(value.toTensor());
  }
  if (value.isTensorList()) {
    c10::List<at::Tensor> list;
    for (const at::Tensor& each : value.toTensorVector()) {
      list.push_back(change(each));
    }
    return list;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> list;
    for (const std::optional<at::Tensor>& each : value.toOptionalTensorVector()) {
      list.push_back(each.has_value() && each->defined() ? std::optional(change(*each)) : each);
    }
    return list;
  }
  if (value.isDevice() && value.toDevice().type() == kOurs) {
    return c10::Device(c10::kCPU);
  }
  return value;
}

bool is_ours(const at::Tensor& tensor) {
  return tensor.device().type() == kOurs;
}

// Calls `op` on the CPU with the stack's tensors as `change` gives them.
void on_cpu(const c10::OperatorHandle& op, torch::jit::Stack& stack, const Change& change) {
  for (c10::IValue& value : stack) {
    value = changed(value, change);
  }
  op.callBoxed(stack);
}

at::Tensor host_view(const at::Tensor& tensor) {
  return is_ours(tensor) ? at_address(tensor, c10::kCPU) : tensor;
}

// Gives `ours` memory of its own, for the sizes that an operator has given its output.
void resize(const at::Tensor& ours, c10::IntArrayRef sizes, c10::IntArrayRef strides) {
  at::Tensor made = at::empty_strided(sizes, strides, ours.options());
  ours.unsafeGetTensorImpl()->set_storage_keep_dtype(made.storage());
  ours.unsafeGetTensorImpl()->set_storage_offset(0);
  ours.unsafeGetTensorImpl()->set_sizes_and_strides(sizes, strides);
}

// The argument that an output is, if it is one.
std::optional<at::Tensor> argument(const at::Tensor& out, const std::vector<std::pair<at::Tensor, at::Tensor>>& seen) {
  for (const auto& [ours, host] : seen) {
    if (host.is_same(out)) {
      if (ours.sizes() != out.sizes()) {
        resize(ours, out.sizes(), out.strides());
        if (capturing == nullptr && out.numel() != 0) {
          host_view(ours).copy_(out);
        }
      }
      return ours;
    }
  }
  return std::nullopt;
}

void call(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  std::vector<std::pair<at::Tensor, at::Tensor>> seen;
  const torch::jit::Stack given(*stack);
  on_cpu(op, *stack, [&](const at::Tensor& tensor) {
    if (!is_ours(tensor)) {
      return tensor;
    }
    at::Tensor host = capturing != nullptr ? host_view(tensor).clone() : host_view(tensor);
    seen.emplace_back(tensor, host);
    return host;
  });
  for (c10::IValue& value : *stack) {
    value = changed(value, [&](const at::Tensor& out) {
      if (auto found = argument(out, seen)) {
        return *found;
      }
      at::Tensor made = at::empty_strided(out.sizes(), out.strides(), out.options().device(kDevice));
      if (capturing == nullptr && out.numel() != 0) {
        host_view(made).copy_(out);
      }
      return made;
    });
  }
  if (capturing != nullptr) {
    Call recorded;
    recorded.op = new c10::OperatorHandle(op);
    auto address = [](const at::Tensor& tensor) {
      return is_ours(tensor) && tensor.numel() != 0 ? at_address(tensor, kDevice) : tensor;
    };
    for (const c10::IValue& value : given) {
      recorded.given.push_back(value.isDevice() ? value : changed(value, address));
    }
    for (const c10::IValue& value : *stack) {
      recorded.gave.push_back(changed(value, address));
    }
    capturing->calls.push_back(std::move(recorded));
  }
}

void replay(int64_t number) {
  for (const Call& each : graphs.at(number)->calls) {
    if (each.host_function != nullptr) {
      each.host_function();
      continue;
    }
    torch::jit::Stack stack(each.given);
    on_cpu(*each.op, stack, host_view);
    for (size_t i = 0; i < stack.size(); ++i) {
      std::vector<at::Tensor> made, kept;
      changed(stack[i], [&](const at::Tensor& out) { return made.push_back(out), out; });
      changed(each.gave[i], [&](const at::Tensor& out) { return kept.push_back(out), out; });
      for (size_t j = 0; j < made.size(); ++j) {
        if (made[j].numel() != 0 && made[j].data_ptr() != kept[j].data_ptr()) {
          host_view(kept[j]).copy_(made[j]);
        }
      }
    }
  }
}

// ---- what a device has to have ----------------------------------------------------------------------------------------

struct Guard final : c10::impl::NoOpDeviceGuardImpl<kOurs> {
  c10::Device exchangeDevice(c10::Device) const override {
    return kDevice;
  }
  c10::Device getDevice() const override {
    return kDevice;
  }
  c10::Stream getStream(c10::Device) const noexcept override {
    return c10::Stream(c10::Stream::DEFAULT, kDevice);
  }
  c10::Stream getNewStream(c10::Device, int) const override {
    return c10::Stream(c10::Stream::DEFAULT, kDevice);
  }
  c10::Stream exchangeStream(c10::Stream) const noexcept override {
    return c10::Stream(c10::Stream::DEFAULT, kDevice);
  }
  void record(void** event, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {
    static int token;
    *event = &token;
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override {
    return true;
  }
  void synchronizeEvent(void*) const override {
    TORCH_CHECK(capturing == nullptr, "an event is waited for while a graph is captured");
  }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override {
    return true;
  }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {
    TORCH_CHECK(capturing == nullptr, "the device is waited for while a graph is captured");
  }
};

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override {
    return true;
  }
  bool isAvailable() const override {
    return true;
  }
  bool hasPrimaryContext(c10::DeviceIndex) const override {
    return true;
  }
  c10::DeviceIndex deviceCount() const override {
    return 1;
  }
  c10::DeviceIndex getCurrentDevice() const override {
    return 0;
  }
  c10::Allocator* getPinnedMemoryAllocator() const override {
    return c10::GetCPUAllocator();
  }
  at::Device getDeviceFromPtr(void*) const override {
    return kDevice;
  }
};

Hooks hooks;

at::Tensor empty(
    c10::SymIntArrayRef size,
    std::optional<c10::ScalarType> dtype,
    std::optional<c10::Layout>,
    std::optional<c10::Device>,
    std::optional<bool>,
    std::optional<c10::MemoryFormat> format) {
  auto type = dtype.value_or(c10::get_default_dtype_as_scalartype());
  return at::detail::empty_generic(
      C10_AS_INTARRAYREF_SLOW(size), &memory, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), type, format);
}

at::Tensor empty_strided(
    c10::SymIntArrayRef size,
    c10::SymIntArrayRef stride,
    std::optional<c10::ScalarType> dtype,
    std::optional<c10::Layout>,
    std::optional<c10::Device>,
    std::optional<bool>) {
  auto type = dtype.value_or(c10::get_default_dtype_as_scalartype());
  return at::detail::empty_strided_generic(
      C10_AS_INTARRAYREF_SLOW(size),
      C10_AS_INTARRAYREF_SLOW(stride),
      &memory,
      c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
      type);
}

at::Tensor copy_from(const at::Tensor& self, const at::Tensor& to, bool) {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("aten::copy_", "");
  torch::jit::Stack stack{to, self, false};
  if (!is_ours(to) && capturing != nullptr) {  // its memory is to stay: recorded as a CPU tensor that is written
    Call recorded;
    recorded.op = new c10::OperatorHandle(op);
    recorded.given = {to, at_address(self, kDevice), false};
    recorded.gave = {to};
    capturing->calls.push_back(std::move(recorded));
    return to;
  }
  call(op, &stack);
  return to;
}

const at::Tensor& resize_(const at::Tensor& self, c10::SymIntArrayRef size, std::optional<c10::MemoryFormat>) {
  auto sizes = C10_AS_INTARRAYREF_SLOW(size);
  if (self.sizes() != sizes) {
    resize(self, sizes, c10::contiguous_strides(sizes));
  }
  return self;
}

at::Tensor copy_from_and_resize(const at::Tensor& self, const at::Tensor& to) {
  to.resize_(self.sizes());
  return copy_from(self, to, false);
}

at::Scalar local_scalar(const at::Tensor& self) {
  TORCH_CHECK(capturing == nullptr, "a value is asked for while a graph is captured");
  return host_view(self).item();
}

at::Tensor& set_storage(
    at::Tensor& self, at::Storage storage, c10::SymInt offset, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  at::native::checkSetStorage(
      self, storage, offset.expect_int(), C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
  self.unsafeGetTensorImpl()->set_storage_offset(offset.expect_int());
  at::native::resize_impl_cpu_(
      self.unsafeGetTensorImpl(), C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
  return self;
}

at::Tensor as_strided(
    const at::Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<c10::SymInt> offset) {
  auto at = offset.has_value() ? std::optional<int64_t>(offset->expect_int()) : std::nullopt;
  return at::native::as_strided_tensorimpl(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), at);
}

at::Tensor view(const at::Tensor& self, c10::SymIntArrayRef size) {
  return at::native::view(self, C10_AS_INTARRAYREF_SLOW(size));
}

at::Tensor reshape_alias(const at::Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  return at::native::_reshape_alias(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("as_strided", &as_strided);
  m.impl("view", &view);
  m.impl("_reshape_alias", &reshape_alias);
  m.impl("resize_", &resize_);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("_local_scalar_dense", &local_scalar);
  m.impl("set_.source_Storage_storage_offset", &set_storage);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&call>());
}

TORCH_LIBRARY(host_device, m) {
  m.def("begin() -> ()", [] {
    TORCH_CHECK(capturing == nullptr, "a graph is being captured already");
    graphs.push_back(std::make_unique<Graph>());
    capturing = graphs.back().get();
  });
  m.def("end() -> int", []() -> int64_t {
    capturing = nullptr;
    return static_cast<int64_t>(graphs.size()) - 1;
  });
  m.def("capturing() -> bool", [] { return capturing != nullptr; });
  m.def("replay(int graph) -> ()", &replay);
  m.def("calls(int graph) -> int", [](int64_t graph) { return static_cast<int64_t>(graphs.at(graph)->calls.size()); });
  m.def("host_function(int address) -> ()", [](int64_t address) {
    auto function = reinterpret_cast<void (*)()>(address);
    if (capturing == nullptr) {
      return function();
    }
    Call recorded;
    recorded.host_function = function;
    capturing->calls.push_back(std::move(recorded));
  });
}

struct Registered {
  Registered() {
    c10::SetAllocator(kOurs, &memory);
    at::RegisterPrivateUse1HooksInterface(&hooks);
  }
} registered;

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

}  // namespace
