#include <limits>

#include "bindings_wgrad.h"
#include "cuda/wgrad/conv_wgrad.h"
#include "cuda/wgrad/pack.h"

namespace py = pybind11;

namespace neq {
namespace {

void check(const char* what, const char* error) {
  if (error) throw std::runtime_error(std::string(what) + " on CUDA: " + error);
}

int64_t cuda_pack_scratch_bytes(const Tensor& dy, int64_t k) {
  require(dy.dims() == 2, "dimensions of dy", dy.dims(), "2");
  require(k >= 0, "k", k, "at least 0");
  return cuda::pack_scratch_bytes(dy.dtype(), dy.size(0), k);
}

// scratch: as many bytes as cuda_pack_scratch_bytes says, if there are sums.
void cuda_pack_columns(const Tensor& dy, const Tensor& rows, const Tensor& packed,
                       const std::optional<Tensor>& sums, const Tensor& scratch, int device,
                       uintptr_t stream) {
  check_pack(dy, rows, packed, sums);
  require(device >= 0, "device", device, "at least 0");
  check("pack_columns", cuda::pack_columns(dy.dtype(), dy.data(), dy.size(0), dy.stride(0),
                                           rows.data<const int64_t>(), rows.size(0), packed.data(),
                                           sums ? sums->data() : nullptr, scratch.data(), device,
                                           reinterpret_cast<void*>(stream)));
}

cuda::Size2 size2(const Ints& given) { return {int(given[0]), int(given[1])}; }

// t [images, channels, lines, columns]. The stride of a dimension of size 1 is never used.
cuda::Images images(const Tensor& t) {
  int64_t stride[4];
  for (int i = 0; i < 4; ++i) stride[i] = t.size(i) > 1 ? t.stride(i) : 0;
  constexpr int64_t max = std::numeric_limits<int>::max();
  require(t.stride(1) == 1, "stride of channels", t.stride(1), "1");
  require(t.size(1) % 8 == 0, "neurons or channels", t.size(1), "a multiple of 8");
  const auto address = reinterpret_cast<uintptr_t>(t.data());
  require(address % 16 == 0, "address", int64_t(address), "a multiple of 16");
  for (const int i : {0, 2, 3})
    require(stride[i] >= 0 && stride[i] % 8 == 0, "a stride", stride[i], "a multiple of 8");
  const int64_t extent = (t.size(2) * stride[2] + t.size(3) * stride[3]) / 8;
  require(extent <= max, "16-byte pieces in an image", extent, "at most " + std::to_string(max));
  return {t.data(), stride[0] / 8, int(stride[2] / 8), int(stride[3] / 8)};
}

void cuda_conv_wgrad(const Tensor& dy, const Tensor& x, const Tensor& dw, const Tensor& db,
                     const Tensor& order, int64_t k, const Ints& stride, const Ints& padding,
                     const Ints& dilation, const Ints& tile, int octets, int slices, int64_t parts,
                     const Tensor& partial_dw, const Tensor& partial_db, int device,
                     uintptr_t stream) {
  check_conv(dy, x, dw, stride, padding, dilation, 1);
  require(stride.size() == 2, "spatial dimensions", int64_t(stride.size()), "2");
  const DType dtype = dy.dtype();
  require(dtype == DType::float16 || dtype == DType::bfloat16, "bytes of an element of dy",
          bytes_of(dtype), "2");
  const int64_t neurons = dy.size(1), taps = dw.size(2) * dw.size(3);
  require_order(order, neurons);
  require_between("k", k, 1, neurons);
  require(tile.size() == 2, "dimensions of a tile", int64_t(tile.size()), "2");
  int64_t tiles = dy.size(0);
  for (int i = 0; i < 2; ++i) {
    require(tile[i] >= 1 && tile[i] <= dy.size(i + 2), "a tile's size", tile[i],
            "between 1 and the output's, " + std::to_string(dy.size(i + 2)));
    tiles *= ceil_div(dy.size(i + 2), tile[i]);
  }
  require(octets >= 1 && octets <= 4, "octets", octets, "between 1 and 4");
  require(slices >= 1 && slices * taps <= 36, "slices", slices,
          "at least 1, and at most 36 / " + std::to_string(taps) + " taps");
  require(parts >= 1 && parts <= tiles && parts < 1 << 16, "parts", parts,
          "between 1 and tiles = " + std::to_string(tiles) + ", and below 65536");
  require(device >= 0, "device", device, "at least 0");

  cuda::ConvWgrad problem{};
  problem.dtype = dtype;
  problem.weight_dtype = dw.dtype();
  problem.images = int(dy.size(0));
  problem.neurons = int(neurons);
  problem.channels = int(x.size(1));
  problem.k = int(k);
  problem.input = {int(x.size(2)), int(x.size(3))};
  problem.output = {int(dy.size(2)), int(dy.size(3))};
  problem.kernel = {int(dw.size(2)), int(dw.size(3))};
  problem.stride = size2(stride);
  problem.padding = size2(padding);
  problem.dilation = size2(dilation);
  problem.dy = images(dy);
  problem.x = images(x);
  problem.dw = dw.data();
  std::ranges::copy(dw.strides(), problem.dw_strides);
  problem.db = bias_gradient(db, dw.dtype(), neurons);
  problem.order = order.data<const int64_t>();
  problem.partial_dw = partial_dw.data<float>();
  problem.partial_db = partial_db.data<float>();
  problem.plan = {size2(tile), octets, slices, int(parts)};
  check("conv_wgrad", cuda::conv_wgrad(problem, device, reinterpret_cast<void*>(stream)));
}

}  // namespace

void bind_cuda(py::module_& m) {
  m.def("cuda_pack_scratch_bytes", &cuda_pack_scratch_bytes, py::arg("dy"), py::arg("k"));
  m.def("cuda_pack_columns", &cuda_pack_columns, py::arg("dy"), py::arg("rows"), py::arg("packed"),
        py::arg("sums"), py::arg("scratch"), py::arg("device"), py::arg("stream"));
  m.def("cuda_conv_wgrad", &cuda_conv_wgrad, py::arg("dy"), py::arg("x"), py::arg("dw"),
        py::arg("db"), py::arg("order"), py::arg("k"), py::arg("stride"), py::arg("padding"),
        py::arg("dilation"), py::arg("tile"), py::arg("octets"), py::arg("slices"),
        py::arg("parts"), py::arg("partial_dw"), py::arg("partial_db"), py::arg("device"),
        py::arg("stream"));
}

}  // namespace neq
