#include <algorithm>
#include <initializer_list>
#include <limits>

#include "bindings_wgrad.h"
#include "cuda/wgrad/conv_wgrad.h"
#include "cuda/wgrad/pack.h"
#include "cuda/wgrad/place.h"
#include "cuda/wgrad/zero.h"

namespace py = pybind11;

namespace neq {
namespace {

void check(const char* what, const char* error) {
  if (error) throw std::runtime_error(std::string(what) + " on CUDA: " + error);
}

bool aligned(const Tensor& t, uintptr_t bytes) {
  return reinterpret_cast<uintptr_t>(t.data()) % bytes == 0;
}

int64_t cuda_pack_scratch_bytes(const Tensor& dy, int64_t k) {
  require(dy.dims() == 2, "dimensions of dy", dy.dims(), "2");
  require(k >= 0, "k", k, "at least 0");
  return cuda::pack_scratch_bytes(dy.dtype(), dy.size(0), k);
}

// scratch: at least as many bytes as cuda_pack_scratch_bytes says, if there are sums.
void cuda_pack_columns(const Tensor& dy, const Tensor& rows, const Tensor& packed,
                       const std::optional<Tensor>& sums, const Tensor& scratch, int device,
                       uintptr_t stream) {
  require_cuda(device, dy, rows, packed, sums.value_or(packed), scratch);
  check_pack(dy, rows, packed, sums);
  if (sums) {
    const int64_t bytes = cuda_pack_scratch_bytes(dy, rows.size(0));
    require(scratch.is_contiguous() && aligned(scratch, 8), "scratch",
            "contiguous, at a multiple of 8 bytes");
    if (scratch.bytes() < bytes)
      refuse("bytes of scratch", scratch.bytes(), "at least " + std::to_string(bytes));
  }
  check("pack_columns", cuda::pack_columns(dy.dtype(), dy.data(), dy.size(0), dy.stride(0),
                                           rows.data<const int64_t>(), rows.size(0), packed.data(),
                                           sums ? sums->data() : nullptr, scratch.data(), device,
                                           reinterpret_cast<void*>(stream)));
}

cuda::Rows rows_of(const Tensor& t, int dim) {
  const int64_t neurons = t.size(dim), width = neurons > 1 ? t.stride(dim) : t.numel();
  return {t.data(), t.numel() / (neurons * width), neurons, width * bytes_of(t.dtype())};
}

// Zeroes the rows of dimension `dim` of a weight's gradient, and those of the bias's. Returns
// false, having done nothing, if one does not fill its memory, or is empty.
bool cuda_zero_rows(const Tensor& dw, int dim, const std::optional<Tensor>& db, const Tensor& rows,
                    int device, uintptr_t stream) {
  require_cuda(device, dw, rows, db.value_or(dw));
  require(dim >= 0 && dim < dw.dims(), "dim", dim, "a dimension of dw");
  require_indices(rows, "rows");
  if (db) {
    require(db->dims() == 1, "dimensions of db", db->dims(), "1");
    require(db->size(0) == dw.size(dim), "size of db", db->size(0), "that of dw");
  }
  for (const Tensor* t : {&dw, db ? &*db : &dw})
    if (!t->fills_its_memory() || t->numel() == 0) return false;
  const cuda::Rows none{};
  check("zero_rows",
        cuda::zero_rows(rows_of(dw, dim), db ? rows_of(*db, 0) : none, rows.data<const int64_t>(),
                        rows.size(0), device, reinterpret_cast<void*>(stream)));
  return true;
}

// Does a packed gradient lie in memory as dw does, but for how many rows there are along `dim`?
bool lies_as(const Tensor& dw, const Tensor& rows, int dim, int64_t width) {
  for (int d = 0; d < dw.dims(); ++d) {
    const bool outer = d != dim && dw.stride(d) >= width * dw.size(dim);
    const int64_t theirs = outer ? dw.stride(d) / dw.size(dim) * rows.size(dim) : dw.stride(d);
    if (rows.size(d) > 1 && rows.stride(d) != theirs) return false;
  }
  return true;
}

// db and its sums: [neurons] in dw's dtype, and [packed] in that in which pack_columns adds.
void check_placed_bias(const Tensor& db, const Tensor& sums, const Tensor& dw, const Tensor& rows,
                       int dim) {
  require(db.dims() == 1 && db.is_contiguous() && db.size(0) == dw.size(dim) &&
              db.dtype() == dw.dtype(),
          "db", "contiguous, of dw's neurons and dtype");
  const bool wide = rows.dtype() == DType::float64;
  require(sums.dims() == 1 && sums.is_contiguous() && sums.size(0) == rows.size(dim) &&
              sums.dtype() == (wide ? DType::float64 : DType::float32),
          "sums", "contiguous, one for each of rows, in float32, or float64 if rows are");
}

// Writes dw, and db if given, from packed rows and their sums. Returns false, having done nothing,
// if dw does not fill its memory, if it is empty or too large, if rows lie differently, or if there
// is no kernel for the dtypes.
bool cuda_place_rows(const Tensor& rows, const std::optional<Tensor>& sums, const Tensor& dw,
                     const std::optional<Tensor>& db, int dim, const Tensor& order, int64_t k,
                     int device, uintptr_t stream) {
  require_cuda(device, rows, sums.value_or(rows), dw, db.value_or(dw), order);
  require(dim >= 0 && dim < dw.dims(), "dim", dim, "a dimension of dw");
  require(rows.dims() == dw.dims(), "dimensions of rows", rows.dims(), "those of dw");
  const int64_t neurons = dw.size(dim), packed = rows.size(dim);
  for (int d = 0; d < dw.dims(); ++d)
    require(d == dim || rows.size(d) == dw.size(d), "a size of rows", rows.size(d), "that of dw");
  require_order(order, neurons);
  require_between("rows", packed, 0, neurons);
  require(k >= 0 && k <= packed, "k", k, "between 0 and the number of rows");
  require(sums.has_value() == db.has_value(), "sums", "given if db is");
  if (db) check_placed_bias(*db, *sums, dw, rows, dim);
  if (!dw.fills_its_memory() || dw.numel() == 0) return false;
  const cuda::Rows to = rows_of(dw, dim);
  const int64_t width = to.width / bytes_of(dw.dtype());
  if (neurons * width > cuda::kMostPlaced || !lies_as(dw, rows, dim, width) ||
      !cuda::can_place(rows.dtype(), dw.dtype()))
    return false;
  const cuda::Placing p{rows.dtype(),
                        dw.dtype(),
                        rows.data(),
                        sums ? sums->data() : nullptr,
                        dw.data(),
                        db ? db->data() : nullptr,
                        order.data<const int64_t>(),
                        to.lines,
                        packed,
                        neurons,
                        width,
                        k};
  check("place_rows", cuda::place_rows(p, device, reinterpret_cast<void*>(stream)));
  return true;
}

cuda::Size2 size2(const Ints& given) { return {int(given[0]), int(given[1])}; }

constexpr int64_t kMaxInt = std::numeric_limits<int>::max();

void require_int(const char* argument, int64_t given) {
  if (given > kMaxInt) refuse(argument, given, "at most " + std::to_string(kMaxInt));
}

// t [images, channels, lines, columns]. The stride of a dimension of size 1 is never used.
cuda::Images images(const Tensor& t) {
  int64_t stride[4];
  for (int i = 0; i < 4; ++i) stride[i] = t.size(i) > 1 ? t.stride(i) : 0;
  for (const int64_t size : t.sizes()) require_int("a size", size);
  require(t.stride(1) == 1, "stride of channels", t.stride(1), "1");
  require(t.size(1) % 8 == 0, "neurons or channels", t.size(1), "a multiple of 8");
  require(aligned(t, 16), "address", reinterpret_cast<intptr_t>(t.data()), "a multiple of 16");
  for (const int i : {0, 2, 3})
    require(stride[i] >= 0 && stride[i] % 8 == 0, "a stride", stride[i], "a multiple of 8");
  require_int("16-byte pieces in an image", (t.size(2) * stride[2] + t.size(3) * stride[3]) / 8);
  return {t.data(), stride[0] / 8, int(stride[2] / 8), int(stride[3] / 8)};
}

// More than any GPU has of shared memory, and few enough for the ints in which the kernel counts.
constexpr int64_t kMaxTilePixels = 1 << 20, kMaxTileBytes = 1 << 28;

void check_tile(const cuda::ConvWgrad& p) {
  const auto [tile, octets, slices, parts] = p.plan;
  const auto window = [](int64_t tile, int64_t stride, int64_t kernel, int64_t dilation) {
    return (tile - 1) * stride + (kernel - 1) * dilation + 1;
  };
  const int64_t lines = window(tile.y, p.stride.y, p.kernel.y, p.dilation.y);
  const int64_t columns = window(tile.x, p.stride.x, p.kernel.x, p.dilation.x);
  const int64_t pixels = lines * columns;
  require(pixels <= kMaxTilePixels, "pixels of x in a tile", pixels, "at most 2^20");
  const int64_t bytes = pixels * cuda::x_pixel_bytes(slices) +
                        ceil_div(tile.y * tile.x, 16) * 16 * cuda::dy_pixel_bytes(p.neurons);
  require(bytes <= kMaxTileBytes, "bytes of a tile", bytes, "at most 2^28");
}

// t: contiguous float32 of these sizes.
void require_partial(const char* argument, const Tensor& t, std::initializer_list<int64_t> sizes) {
  if (std::ranges::equal(t.sizes(), sizes) && t.is_contiguous() && t.dtype() == DType::float32)
    return;
  std::string text;
  for (const int64_t size : sizes) text += (text.empty() ? "" : ", ") + std::to_string(size);
  throw std::invalid_argument(std::string(argument) + " must be contiguous float32 [" + text + "]");
}

void cuda_conv_wgrad(const Tensor& dy, const Tensor& x, const Tensor& dw, const Tensor& db,
                     const Tensor& order, int64_t k, const Ints& stride, const Ints& padding,
                     const Ints& dilation, const Ints& tile, int octets, int slices, int64_t parts,
                     const Tensor& partial_dw, const Tensor& partial_db, int device,
                     uintptr_t stream) {
  require_cuda(device, dy, x, dw, db, order, partial_dw, partial_db);
  check_conv(dy, x, dw, stride, padding, dilation, 1);
  require(stride.size() == 2, "spatial dimensions", int64_t(stride.size()), "2");
  const DType dtype = dy.dtype();
  require(dw.fills_its_memory(), "dw", "without gaps and overlaps in memory");
  require(dtype == DType::float16 || dtype == DType::bfloat16, "bytes of an element of dy",
          bytes_of(dtype), "2");
  const int64_t neurons = dy.size(1), taps = dw.size(2) * dw.size(3);
  require_order(order, neurons);
  require_between("k", k, 1, neurons);
  require_between("rows of dw", dw.size(0), k, neurons);
  require(tile.size() == 2, "dimensions of a tile", int64_t(tile.size()), "2");
  int64_t tiles = dy.size(0);
  for (int i = 0; i < 2; ++i) {
    require(tile[i] >= 1 && tile[i] <= dy.size(i + 2), "a tile's size", tile[i],
            "between 1 and the output's, " + std::to_string(dy.size(i + 2)));
    tiles *= ceil_div(dy.size(i + 2), tile[i]);
    require_int("tiles", tiles);
  }
  require(octets >= 1 && octets <= 4, "octets", octets, "between 1 and 4");
  require(slices >= 1 && slices * taps <= 36, "slices", slices,
          "at least 1, and at most 36 / " + std::to_string(taps) + " taps");
  require(parts >= 1 && parts <= tiles && parts < 1 << 16, "parts", parts,
          "between 1 and tiles = " + std::to_string(tiles) + ", and below 65536");

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
  problem.rows = int(dw.size(0));
  problem.dw = dw.data();
  std::ranges::copy(dw.strides(), problem.dw_strides);
  problem.db = bias_gradient(db, dw.dtype(), dw.size(0));
  problem.order = order.data<const int64_t>();
  problem.partial_dw = partial_dw.data<float>();
  problem.partial_db = partial_db.data<float>();
  problem.plan = {size2(tile), octets, slices, int(parts)};
  check_tile(problem);
  const int64_t padded = ceil_div(k, 8 * octets) * 8 * octets;
  require_partial("partial_dw", partial_dw, {parts, padded, taps * x.size(1)});
  if (problem.db) require_partial("partial_db", partial_db, {parts, padded});
  check("conv_wgrad", cuda::conv_wgrad(problem, device, reinterpret_cast<void*>(stream)));
}

}  // namespace

void bind_cuda(py::module_& m) {
  m.def("cuda_pack_scratch_bytes", &cuda_pack_scratch_bytes, py::arg("dy"), py::arg("k"));
  m.def("cuda_pack_columns", &cuda_pack_columns, py::arg("dy"), py::arg("rows"), py::arg("packed"),
        py::arg("sums"), py::arg("scratch"), py::arg("device"), py::arg("stream"));
  m.def("cuda_zero_rows", &cuda_zero_rows, py::arg("dw"), py::arg("dim"), py::arg("db"),
        py::arg("rows"), py::arg("device"), py::arg("stream"));
  m.def("cuda_place_rows", &cuda_place_rows, py::arg("rows"), py::arg("sums"), py::arg("dw"),
        py::arg("db"), py::arg("dim"), py::arg("order"), py::arg("k"), py::arg("device"),
        py::arg("stream"));
  m.def("cuda_conv_wgrad", &cuda_conv_wgrad, py::arg("dy"), py::arg("x"), py::arg("dw"),
        py::arg("db"), py::arg("order"), py::arg("k"), py::arg("stride"), py::arg("padding"),
        py::arg("dilation"), py::arg("tile"), py::arg("octets"), py::arg("slices"),
        py::arg("parts"), py::arg("partial_dw"), py::arg("partial_db"), py::arg("device"),
        py::arg("stream"));
}

}  // namespace neq
