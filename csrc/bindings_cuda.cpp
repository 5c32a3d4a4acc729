#include <limits>

#include "bindings.h"
#include "cuda/conv_wgrad.h"
#include "cuda/pack.h"

namespace py = pybind11;

namespace neq {
namespace {

void check(const char* what, const char* error) {
  if (error) throw std::runtime_error(std::string(what) + " on CUDA: " + error);
}

int64_t cuda_pack_scratch_bytes(DType dtype, int64_t samples, int64_t k) {
  require(samples >= 0, "samples", samples, "at least 0");
  require(k >= 0, "k", k, "at least 0");
  return cuda::pack_scratch_bytes(dtype, samples, k);
}

void cuda_pack_columns(DType dtype, uintptr_t dy, int64_t samples, int64_t neurons, int64_t stride,
                       uintptr_t rows, int64_t k, uintptr_t packed, uintptr_t sums,
                       uintptr_t scratch, int device, uintptr_t stream) {
  check_pack(samples, neurons, stride, k);
  require(device >= 0, "device", device, "at least 0");
  check("pack_columns",
        cuda::pack_columns(dtype, pointer<const void>(dy), samples, stride,
                           pointer<const int64_t>(rows), k, pointer<void>(packed),
                           pointer<void>(sums), pointer<void>(scratch), device,
                           pointer<void>(stream)));
}

cuda::Size2 size2(const Ints& given) { return {int(given[0]), int(given[1])}; }

// From sizes and strides [images, channels, lines, columns]. Along a single one nobody steps.
cuda::Images images(uintptr_t data, const Ints& size, const Ints& strides) {
  int64_t step[4];
  for (int i = 0; i < 4; ++i) step[i] = size[i] > 1 ? strides[i] : 0;
  constexpr int64_t most = std::numeric_limits<int>::max();
  require(strides[1] == 1, "stride of channels", strides[1], "1");
  require(size[1] % 8 == 0, "neurons or channels", size[1], "a multiple of 8");
  require(data % 16 == 0, "address", int64_t(data), "a multiple of 16");
  for (const int i : {0, 2, 3})
    require(step[i] >= 0 && step[i] % 8 == 0, "a stride", step[i], "a multiple of 8");
  const int64_t extent = (size[2] * step[2] + size[3] * step[3]) / 8;
  require(extent <= most, "16-byte pieces in an image", extent, "at most " + std::to_string(most));
  return {pointer<const void>(data), step[0] / 8, int(step[2] / 8), int(step[3] / 8)};
}

void cuda_conv_wgrad(DType dtype, uintptr_t dy, const Ints& dy_size, const Ints& dy_strides,
                     uintptr_t x, const Ints& x_size, const Ints& x_strides, DType weight_dtype,
                     uintptr_t dw, const Ints& dw_size, const Ints& dw_strides, uintptr_t db,
                     uintptr_t rows, int64_t k, const Ints& stride, const Ints& padding,
                     const Ints& dilation, const Ints& tile, int octets, int slices, int64_t parts,
                     uintptr_t partial_dw, uintptr_t partial_db, int device, uintptr_t stream) {
  check_conv(dy_size, dy_strides, x_size, x_strides, dw_size, dw_strides, stride, padding, dilation,
             1);
  require(stride.size() == 2, "spatial dimensions", int64_t(stride.size()), "2");
  require(dtype == DType::float16 || dtype == DType::bfloat16, "bytes of an element of dy",
          bytes_of(dtype), "2");
  const int64_t neurons = dy_size[1], taps = dw_size[2] * dw_size[3];
  require(k >= 1 && k <= neurons, "k", k, "between 1 and neurons = " + std::to_string(neurons));
  require(tile.size() == 2, "dimensions of a tile", int64_t(tile.size()), "2");
  int64_t tiles = dy_size[0];
  for (int i = 0; i < 2; ++i) {
    require(tile[i] >= 1 && tile[i] <= dy_size[i + 2], "a tile's size", tile[i],
            "between 1 and the output's, " + std::to_string(dy_size[i + 2]));
    tiles *= ceil_div(dy_size[i + 2], tile[i]);
  }
  require(octets >= 1 && octets <= 4, "octets", octets, "between 1 and 4");
  require(slices >= 1 && slices * taps <= 36, "slices", slices,
          "at least 1, and at most 36 / " + std::to_string(taps) + " taps");
  require(parts >= 1 && parts <= tiles && parts < 1 << 16, "parts", parts,
          "between 1 and tiles = " + std::to_string(tiles) + ", and below 65536");
  require(device >= 0, "device", device, "at least 0");

  cuda::ConvWgrad problem{};
  problem.dtype = dtype;
  problem.weight_dtype = weight_dtype;
  problem.images = int(dy_size[0]);
  problem.neurons = int(neurons);
  problem.channels = int(x_size[1]);
  problem.k = int(k);
  problem.input = {int(x_size[2]), int(x_size[3])};
  problem.output = {int(dy_size[2]), int(dy_size[3])};
  problem.kernel = {int(dw_size[2]), int(dw_size[3])};
  problem.stride = size2(stride);
  problem.padding = size2(padding);
  problem.dilation = size2(dilation);
  problem.dy = images(dy, dy_size, dy_strides);
  problem.x = images(x, x_size, x_strides);
  problem.dw = pointer<void>(dw);
  std::copy(dw_strides.begin(), dw_strides.end(), problem.dw_strides);
  problem.db = pointer<void>(db);
  problem.rows = pointer<const int64_t>(rows);
  problem.partial_dw = pointer<float>(partial_dw);
  problem.partial_db = pointer<float>(partial_db);
  problem.plan = {size2(tile), octets, slices, int(parts)};
  check("conv_wgrad", cuda::conv_wgrad(problem, device, pointer<void>(stream)));
}

}  // namespace

void bind_cuda(py::module_& m) {
  m.def("cuda_pack_scratch_bytes", &cuda_pack_scratch_bytes, py::arg("dtype"), py::arg("samples"),
        py::arg("k"));
  m.def("cuda_pack_columns", &cuda_pack_columns, py::arg("dtype"), py::arg("dy"),
        py::arg("samples"), py::arg("neurons"), py::arg("stride"), py::arg("rows"), py::arg("k"),
        py::arg("packed"), py::arg("sums"), py::arg("scratch"), py::arg("device"),
        py::arg("stream"));
  m.def("cuda_conv_wgrad", &cuda_conv_wgrad, py::arg("dtype"), py::arg("dy"), py::arg("dy_size"),
        py::arg("dy_strides"), py::arg("x"), py::arg("x_size"), py::arg("x_strides"),
        py::arg("weight_dtype"), py::arg("dw"), py::arg("dw_size"), py::arg("dw_strides"),
        py::arg("db"), py::arg("rows"), py::arg("k"), py::arg("stride"), py::arg("padding"),
        py::arg("dilation"), py::arg("tile"), py::arg("octets"), py::arg("slices"),
        py::arg("parts"), py::arg("partial_dw"), py::arg("partial_db"), py::arg("device"),
        py::arg("stream"));
}

}  // namespace neq
