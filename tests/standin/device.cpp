// A CUDA device of host memory for a PyTorch that was built without CUDA: what depends on a tensor being elsewhere than on the CPU can then be
// tried without a GPU. Nothing here is fast; everything is meant to be as strict as a GPU.
//
// Memory of both devices lies in one arena that nobody may touch (a CPU kernel that is handed a pointer of a "cuda" tensor faults, as it would with
// a real one) except through the gate, which operators below and the emulated kernels open for as long as they run.
//
// An operator without a kernel for CUDA runs its CPU kernel on CPU tensors over the same memory. Its results are copied into the arena, or are
// views of its arguments if it made such. Tensors of several devices are refused, as by a GPU; scalars on the CPU are welcome.

#include "memory.h"

#include <vector>

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/ops/_sparse_coo_tensor_with_dims_and_tensors_native.h>
#include <ATen/ops/_indices_native.h>
#include <ATen/ops/_values_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

namespace standin {

// ---------------------------------------------------------------------------------------------------- what PyTorch asks of a kind of device
struct Guard final : c10::impl::DeviceGuardImplInterface {
    c10::DeviceType type() const override { return c10::kCUDA; }
    c10::Device getDevice() const override { return {c10::kCUDA, current_device}; }
    c10::DeviceIndex deviceCount() const noexcept override { return kDevices; }
    void uncheckedSetDevice(c10::Device device) const noexcept override { current_device = device.index(); }

    void setDevice(c10::Device device) const override {
        TORCH_CHECK(device.index() >= 0 && device.index() < kDevices, "CUDA error: invalid device ordinal ", static_cast<int>(device.index()));
        current_device = device.index();
    }

    c10::Device exchangeDevice(c10::Device device) const override {
        const c10::Device before = getDevice();
        setDevice(device);
        return before;
    }

    // One stream a device, on which everything is done at once: events have nothing to wait for.
    c10::Stream getStream(c10::Device device) const override { return c10::Stream(c10::Stream::DEFAULT, device); }
    c10::Stream getDefaultStream(c10::Device device) const override { return getStream(device); }
    c10::Stream getNewStream(c10::Device device, int) const override { return getStream(device); }
    c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override { return getStream(device); }
    c10::Stream exchangeStream(c10::Stream stream) const override { return getStream(stream.device()); }
    void record(void**, const c10::Stream&, c10::DeviceIndex, c10::EventFlag) const override {}
    void block(void*, const c10::Stream&) const override {}
    bool queryEvent(void*) const override { return true; }
    bool queryStream(const c10::Stream&) const override { return true; }
    void synchronizeStream(const c10::Stream&) const override {}
    void synchronizeEvent(void*) const override {}
    void synchronizeDevice(c10::DeviceIndex) const override {}
};

C10_REGISTER_GUARD_IMPL(CUDA, Guard)

// A generator of its own. Where none is named, numbers come from the CPU's.
struct DeviceGenerator final : at::CPUGeneratorImpl {
    explicit DeviceGenerator(c10::DeviceIndex index) : place(c10::kCUDA, index) { be_on(place); }
    void be_on(c10::Device device) { device_ = device; }
    c10::Device place;
};

c10::DeviceIndex or_current(c10::DeviceIndex index) { return index < 0 ? current_device : index; }

struct Hooks : at::CUDAHooksInterface {
    explicit Hooks(at::CUDAHooksArgs) {}

    void init() const override {}
    bool isBuilt() const override { return true; }
    bool isAvailable() const override { return true; }
    bool hasCUDA() const override { return true; }
    bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
    c10::DeviceIndex deviceCount() const override { return kDevices; }
    int getNumGPUs() const override { return kDevices; }
    c10::DeviceIndex current_device() const override { return standin::current_device; }
    c10::DeviceIndex getCurrentDevice() const override { return standin::current_device; }
    void setCurrentDevice(c10::DeviceIndex index) const override { standin::current_device = index; }
    c10::DeviceIndex exchangeDevice(c10::DeviceIndex index) const override { return std::exchange(standin::current_device, index); }
    c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex index) const override { return index < 0 ? index : exchangeDevice(index); }
    void deviceSynchronize(c10::DeviceIndex) const override {}
    c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
    c10::Allocator* getCUDADeviceAllocator() const override { return &device_memory; }
    bool isPinnedPtr(const void* place) const override { return PinnedAllocator::has(place); }
    c10::Device getDeviceFromPtr(void*) const override { return {c10::kCUDA, standin::current_device}; }
    at::Generator getNewGenerator(c10::DeviceIndex index) const override { return at::make_generator<DeviceGenerator>(or_current(index)); }

    const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override { return at::detail::getDefaultCPUGenerator(); }
};

} // namespace standin

namespace at {
C10_REGISTER_TYPED_CLASS(CUDAHooksRegistry, "CUDAHooks", standin::Hooks)
} // namespace at

namespace standin {

// --------------------------------------------------------------------------------------------------------------- operators by their CPU kernels
using Sizes = at::IntArrayRef;

at::Tensor over(c10::Storage storage, c10::DispatchKey key, const at::Tensor& like) {
    auto tensor = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), like.dtype());
    tensor.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
    return tensor;
}

// One call of an operator: its CUDA arguments as CPU tensors, and what came of them.
class CPUCall {
  public:
    explicit CPUCall(const c10::OperatorHandle& op) : op_(op), schema_(op.schema()) {}

    void run(torch::jit::Stack* stack) {
        const size_t count = schema_.arguments().size(), first = stack->size() - count;
        const std::vector<c10::IValue> given(stack->begin() + first, stack->end());
        for (const auto& value : given)
            visit(value);
        refuse_mixed_devices();
        const c10::DeviceGuard on(c10::Device(c10::kCUDA, device_.index()));
        const Gate gate;
        for (size_t i = 0; i < count; ++i)
            (*stack)[first + i] = on_cpu(given[i]);
        op_.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
        for (auto& [original, view] : views_)
            take_over(original, view);
        const size_t results = schema_.returns().size();
        for (size_t i = 0; i < results; ++i) {
            auto& value = (*stack)[stack->size() - results + i];
            value = on_device(value, schema_.returns()[i], given);
        }
    }

    ~CPUCall() {
        for (auto* generator : generators_)
            generator->be_on(generator->place);
    }

  private:
    void visit(const c10::IValue& value) {
        if (value.isTensor() && value.toTensor().defined()) {
            visit(value.toTensor());
        } else if (value.isTensorList()) {
            for (const at::Tensor& tensor : value.toTensorVector()) {
                if (tensor.defined())
                    visit(tensor);
            }
        } else if (value.isOptionalTensorList()) {
            for (const std::optional<at::Tensor> tensor : value.toOptionalTensorList()) {
                if (tensor && tensor->defined())
                    visit(*tensor);
            }
        } else if (value.isDevice() && value.toDevice().is_cuda()) {
            asked_for_ = c10::Device(c10::kCUDA, or_current(value.toDevice().index()));
        }
    }

    void visit(const at::Tensor& tensor) {
        if (tensor.is_cuda() ? devices_.empty() || tensor.device() != devices_.front() : tensor.dim() > 0)
            devices_.push_back(tensor.device());
        if (tensor.is_cuda())
            device_ = tensor.device();
    }

    void refuse_mixed_devices() {
        if (asked_for_.is_cuda())
            device_ = asked_for_;
        const std::string& name = schema_.name();
        const bool moves = name == "aten::copy_" || name == "aten::_foreach_copy_";
        const bool indexes = name.find("aten::index") == 0 || name.find("aten::_index_put_impl_") == 0 || name.find("aten::_unsafe_index") == 0;
        for (const auto& other : devices_) {
            TORCH_CHECK(moves || other == devices_.front() || (indexes && devices_.front().is_cuda() && other.is_cpu()),
                        "Expected all tensors to be on the same device, but found at least two devices, ", devices_.front(), " and ", other, "! (",
                        name, ")");
        }
    }

    c10::IValue on_cpu(const c10::IValue& value) {
        if (value.isTensor())
            return on_cpu(value.toTensor());
        if (value.isDevice() && value.toDevice().is_cuda())
            return c10::Device(c10::kCPU);
        if (value.isTensorList()) {
            c10::List<at::Tensor> list;
            for (const at::Tensor& tensor : value.toTensorVector())
                list.push_back(on_cpu(tensor));
            return list;
        }
        if (value.isOptionalTensorList()) {
            c10::List<std::optional<at::Tensor>> list;
            for (const std::optional<at::Tensor> tensor : value.toOptionalTensorList()) {
                list.push_back(tensor ? std::optional(on_cpu(*tensor)) : std::nullopt);
            }
            return list;
        }
        if (value.isGenerator() && value.toGenerator().device().is_cuda()) {
            generators_.push_back(static_cast<DeviceGenerator*>(value.toGenerator().unsafeGetGeneratorImpl()));
            generators_.back()->be_on(c10::Device(c10::kCPU));
        }
        return value;
    }

    at::Tensor on_cpu(const at::Tensor& tensor) {
        if (!tensor.defined() || !tensor.is_cuda())
            return tensor;
        c10::DataPtr memory(tensor.storage().mutable_data(), c10::Device(c10::kCPU));
        c10::Storage storage({}, tensor.storage().nbytes(), std::move(memory), &host_view_memory, /*resizable=*/true);
        at::Tensor view = over(std::move(storage), c10::DispatchKey::CPU, tensor);
        views_.emplace_back(tensor, view);
        return view;
    }

    // A result argument that the kernel gave another shape or other memory.
    void take_over(const at::Tensor& original, const at::Tensor& view) {
        if (view.storage().data() != original.storage().data()) {
            auto memory = view.storage().set_data_ptr(c10::DataPtr(nullptr, c10::Device(c10::kCPU)));
            const c10::Device device = original.device();
            original.storage().set_data_ptr({memory.get(), memory.release_context(), &give_back, device});
            original.storage().set_nbytes(view.storage().nbytes());
        }
        if (view.sizes() != original.sizes() || view.strides() != original.strides() || view.storage_offset() != original.storage_offset()) {
            original.unsafeGetTensorImpl()->set_sizes_and_strides(view.sizes(), view.strides(), view.storage_offset());
        }
    }

    c10::IValue on_device(const c10::IValue& value, const c10::Argument& result, const std::vector<c10::IValue>& given) {
        const auto* alias = result.alias_info();
        if (alias != nullptr && alias->isWrite()) {
            for (size_t i = 0; i < given.size(); ++i) {
                const auto* argument = schema_.arguments()[i].alias_info();
                if (argument != nullptr && *argument == *alias)
                    return given[i];
            }
        }
        if (value.isTensor())
            return on_device(value.toTensor());
        if (value.isTensorList()) {
            c10::List<at::Tensor> list;
            for (const at::Tensor& tensor : value.toTensorVector())
                list.push_back(on_device(tensor));
            return list;
        }
        return value;
    }

    at::Tensor on_device(const at::Tensor& result) {
        if (!result.defined() || !device_.is_cuda())
            return result;
        if (result.is_sparse())
            return at::_sparse_coo_tensor_unsafe(on_device(result._indices()), on_device(result._values()), result.sizes());
        for (const auto& [original, view] : views_) {
            if (result.storage().data() != nullptr && result.storage().data() == view.storage().data()) {
                return over(original.storage(), c10::DispatchKey::CUDA, result);
            }
        }
        const size_t bytes = result.storage().nbytes();
        const void* data = result.storage().data();
        c10::Storage storage({}, bytes, device_memory.allocate(bytes), &device_memory, /*resizable=*/true);
        if (data != nullptr)
            std::memcpy(storage.mutable_data(), data, bytes);
        else if (bytes != 0) // zeros that need no memory, as forward mode makes them
            std::memset(storage.mutable_data(), 0, bytes);
        return over(std::move(storage), c10::DispatchKey::CUDA, result);
    }

    const c10::OperatorHandle& op_;
    const c10::FunctionSchema& schema_;
    c10::Device device_{c10::kCPU}, asked_for_{c10::kCPU};
    std::vector<c10::Device> devices_;
    std::vector<std::pair<at::Tensor, at::Tensor>> views_;
    std::vector<DeviceGenerator*> generators_;
};

void by_cpu_kernel(const c10::OperatorHandle& op, torch::jit::Stack* stack) { CPUCall(op).run(stack); }

// ------------------------------------------------------------------------------------------------------ operators that make or place memory
constexpr c10::DispatchKeySet kKeys(c10::DispatchKey::CUDA);

at::Tensor empty(Sizes size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<at::Device> device, std::optional<bool>,
                 std::optional<at::MemoryFormat> format) {
    const c10::OptionalDeviceGuard on(device);
    return at::detail::empty_generic(size, &device_memory, kKeys, c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(Sizes size, Sizes stride, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<at::Device> device,
                         std::optional<bool>) {
    const c10::OptionalDeviceGuard on(device);
    return at::detail::empty_strided_generic(size, stride, &device_memory, kKeys, c10::dtype_or_default(dtype));
}

at::Tensor& set_storage_at(at::Tensor& self, at::Storage source, int64_t offset, Sizes size, Sizes stride) {
    TORCH_CHECK(source.device() == self.device(), "Expected a storage on ", self.device(), ", got one on ", source.device());
    return at::native::set_storage_cpu_(self, std::move(source), offset, size, stride);
}

at::Tensor& set_storage(at::Tensor& self, at::Storage source) {
    const int64_t elements = static_cast<int64_t>(source.nbytes() / self.itemsize());
    return set_storage_at(self, std::move(source), 0, {elements}, {});
}

at::Tensor& set_tensor(at::Tensor& self, const at::Tensor& source) {
    return set_storage_at(self, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

at::Tensor& set_nothing(at::Tensor& self) {
    c10::Storage storage({}, 0, device_memory.allocate(0), &device_memory, true);
    return set_storage_at(self, std::move(storage), 0, {0}, {});
}

void record_stream(at::Tensor&, at::Stream) {}

at::Tensor histc(const at::Tensor& self, int64_t bins, const at::Scalar& min, const at::Scalar& max) { // of integers as well, as on a GPU
    return at::histc(self.cpu().to(at::kDouble), bins, min, max).to(self.options());
}

// Sparse tensors can be made and looked at, for those who refuse them.
TORCH_LIBRARY_IMPL(aten, SparseCUDA, library) {
    library.impl("_sparse_coo_tensor_with_dims_and_tensors", &at::native::new_with_dims_and_tensor_sparse_symint);
    library.impl("_indices", &at::native::_indices_sparse);
    library.impl("_values", &at::native::_values_sparse);
}

TORCH_LIBRARY_IMPL(_, CUDA, library) { library.fallback(torch::CppFunction::makeFromBoxedFunction<&by_cpu_kernel>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, library) {
    library.impl("empty.memory_format", &empty);
    library.impl("empty_strided", &empty_strided);
    library.impl("as_strided", &at::native::as_strided_tensorimpl);
    library.impl("view", &at::native::view);
    library.impl("set_.source_Storage_storage_offset", &set_storage_at);
    library.impl("set_.source_Storage", &set_storage);
    library.impl("set_.source_Tensor", &set_tensor);
    library.impl("set_", &set_nothing);
    library.impl("record_stream", &record_stream);
    library.impl("histc", &histc);
    library.impl("_to_sparse", torch::CppFunction::makeFromBoxedFunction<&by_cpu_kernel>());
    library.impl("copy_", torch::CppFunction::makeFromBoxedFunction<&by_cpu_kernel>()); // there is one for every device, which needs a part of each
}

const bool registered = (c10::SetAllocator(c10::kCUDA, &device_memory), true);

} // namespace standin

extern "C" {
void standin_open() { standin::Arena::instance().open(); }
void standin_close() { standin::Arena::instance().close(); }
int standin_device_count() { return standin::kDevices; }
int standin_device() { return standin::current_device; }
void standin_set_device(int device) { standin::current_device = static_cast<c10::DeviceIndex>(device); }
size_t standin_bytes(int device) { return standin::Arena::instance().used(device); }
size_t standin_peak_bytes(int device) { return standin::Arena::instance().peak(device); }
void standin_reset_peak(int device) { standin::Arena::instance().reset_peak(device); }
size_t standin_device_bytes() { return standin::kDeviceBytes; }
}
