#include "bindings_wgrad.h"

#include <algorithm>
#include <array>
#include <numeric>

#include "cpu/buffer.h"
#include "cpu/wgrad/conv_wgrad.h"
#include "cpu/wgrad/pack.h"
#include "cpu/wgrad/zero.h"

namespace py = pybind11;

namespace neq {
namespace {

void cpu_pack_columns(const Tensor& dy, const Tensor& rows, const Tensor& packed,
                      const std::optional<Tensor>& sums, int threads) {
  require_cpu(dy, rows, packed, sums.value_or(packed));
  check_pack(dy, rows, packed, sums);
  require_threads(threads);
  py::gil_scoped_release release;
  cpu::pack_columns(dy.dtype(), dy.data(), dy.size(0), dy.size(1), dy.stride(0),
                    rows.data<const int64_t>(), rows.size(0), packed.data(),
                    sums ? sums->data() : nullptr, threads);
}

// Zeroes the rows of dimension `dim`. Returns false, having done nothing, if a row's pieces are
// less than a cache line each, or the tensor does not fill its memory.
bool cpu_zero_rows(const Tensor& t, const Tensor& rows, int dim, int threads) {
  require_cpu(t, rows);
  require(dim >= 0 && dim < t.dims(), "dim", dim, "a dimension of the tensor");
  require_indices(rows, "rows");
  const int64_t neurons = t.size(dim);
  const auto* row = rows.data<const int64_t>();
  for (int64_t j = 0; j < rows.size(0); ++j)
    if (row[j] < 0 || row[j] >= neurons)
      refuse("rows", row[j], "between 0 and neurons = " + std::to_string(neurons));
  require_threads(threads);
  const int64_t width = neurons > 1 ? t.stride(dim) : t.numel();
  const int64_t bytes = width * bytes_of(t.dtype());
  if (bytes < kLineBytes || !t.fills_its_memory()) return false;
  py::gil_scoped_release release;
  cpu::zero_rows(t.data(), t.numel() / (neurons * width), neurons, bytes, row, rows.size(0),
                 threads);
  return true;
}

void cpu_prefer_large_pages(const Tensor& t) {
  require_cpu(t);
  cpu::prefer_large_pages(t.data(), t.numel() * bytes_of(t.dtype()));
}

using cpu::Size3;

// Up to three sizes as three. Missing ones come first.
Size3 size3(std::span<const int64_t> given, int64_t missing) {
  Size3 size{missing, missing, missing};
  std::ranges::copy_backward(given, size.end());
  return size;
}

// The strides of a tensor with two dimensions before its spatial ones.
cpu::Strides5 strides5(const Tensor& t) {
  cpu::Strides5 strides{t.stride(0), t.stride(1)};
  std::ranges::copy_backward(t.strides().subspan(2), strides.end());
  return strides;
}

// The active rows of dY, and their places in dw.
struct ActiveRows {
  std::vector<int64_t> rows, places;
};

// The rows: the first k of `order`, which ascend. In a dw with as many rows as dY has neurons, they
// keep their places. In a compact one, with fewer, they come first.
ActiveRows active_rows(const Tensor& order, int64_t k, int64_t neurons, const Tensor& dw) {
  require_order(order, neurons);
  require_between("k", k, 0, neurons);
  require_between("rows of dw", dw.size(0), k, neurons);
  const auto* first = order.data<const int64_t>();
  ActiveRows active{{first, first + k}, {first, first + k}};
  for (int64_t j = 0; j < k; ++j)
    if (first[j] <= (j ? first[j - 1] : -1) || first[j] >= neurons)
      refuse("the first k of order", first[j],
             "ascending, between 0 and neurons = " + std::to_string(neurons));
  if (dw.size(0) < neurons) std::iota(active.places.begin(), active.places.end(), 0);
  return active;
}

// What linear layers and convolutions have in common. dw and db hold sums.
cpu::ConvWgrad problem_of(const Tensor& dy, const Tensor& x, const Tensor& dw, const Tensor& db,
                          const ActiveRows& active) {
  require(dw.dtype() == sum_dtype(dy.dtype()), "dw", "of the dtype of sums");
  require(dw.fills_its_memory(), "dw", "without gaps and overlaps in memory");
  cpu::ConvWgrad problem{};
  problem.dtype = dy.dtype();
  problem.dw_rows = dw.size(0);
  problem.channels = dw.size(1);
  problem.dy = dy.data();
  problem.x = x.data();
  problem.dw = dw.data();
  problem.db = bias_gradient(db, dw.dtype(), dw.size(0));
  problem.rows = active.rows.data();
  problem.places = active.places.data();
  problem.k = int64_t(active.rows.size());
  return problem;
}

void cpu_conv_wgrad(const Tensor& dy, const Tensor& x, const Tensor& dw, const Tensor& db,
                    const Tensor& order, int64_t k, const Ints& stride, const Ints& padding,
                    const Ints& dilation, int64_t groups, cpu::Isa isa, int threads,
                    int split_for) {
  require_cpu(dy, x, dw, db, order);
  check_conv(dy, x, dw, stride, padding, dilation, groups);
  const auto active = active_rows(order, k, dy.size(1), dw);
  require(cpu::has_isa(isa), "isa", int64_t(isa), "one that this processor has");
  require(split_for >= 1, "split_for", split_for, "at least 1");
  require_threads(threads);

  auto problem = problem_of(dy, x, dw, db, active);
  problem.samples = dy.size(0);
  problem.neurons = dy.size(1);
  problem.groups = groups;
  problem.input = size3(x.sizes().subspan(2), 1);
  problem.output = size3(dy.sizes().subspan(2), 1);
  problem.kernel = size3(dw.sizes().subspan(2), 1);
  problem.stride = size3(stride, 1);
  problem.padding = size3(padding, 0);
  problem.dilation = size3(dilation, 1);
  problem.dy_strides = strides5(dy);
  problem.x_strides = strides5(x);
  problem.dw_strides = strides5(dw);
  py::gil_scoped_release release;
  cpu::conv_wgrad(problem, isa, threads, split_for);
}

// The dimensions of samples of two tensors, merged into as few as both allow:
// [images, depth, lines, pixels].
struct Samples {
  std::array<int64_t, 4> sizes{1, 1, 1, 1}, dy{}, x{};  // and their strides
};

Samples samples_of(const Tensor& dy, const Tensor& x) {
  Samples samples;
  size_t last = samples.sizes.size() - 1, at = last;
  for (int d = dy.dims() - 1; d-- > 0;) {
    const int64_t size = dy.size(d);
    require(size == x.size(d), "samples of x", x.size(d), std::to_string(size));
    if (size == 1) continue;
    int64_t& inner = samples.sizes[at];
    if (inner > 1) {
      if (dy.stride(d) == inner * samples.dy[at] && x.stride(d) == inner * samples.x[at]) {
        inner *= size;
        continue;
      }
      require(at > 0, "dimensions of samples", dy.dims() - 1, "at most 4 apart in memory");
      --at;
    }
    samples.sizes[at] = size;
    samples.dy[at] = dy.stride(d);
    samples.x[at] = x.stride(d);
  }
  return samples;
}

// dy [..., neurons], x [..., inputs], dw [rows, inputs]: a 1x1 convolution whose pixels are
// samples.
void cpu_linear_wgrad(const Tensor& dy, const Tensor& x, const Tensor& dw, const Tensor& db,
                      const Tensor& order, int64_t k, int threads, int split_for) {
  require_cpu(dy, x, dw, db, order);
  const int last = dy.dims() - 1;
  require(last >= 0 && x.dims() == last + 1, "dimensions of x", x.dims(),
          "as many as those of dy, " + std::to_string(last + 1));
  require(dw.dims() == 2, "dimensions of dw", dw.dims(), "2");
  for (const Tensor* t : {&dy, &x})
    for (const int64_t size : t->sizes()) require(size >= 1, "a size", size, "at least 1");
  require(x.dtype() == dy.dtype(), "x", "of dy's dtype");
  require(x.size(last) == dw.size(1), "inputs of x", x.size(last), std::to_string(dw.size(1)));
  const auto active = active_rows(order, k, dy.size(last), dw);
  require(split_for >= 1, "split_for", split_for, "at least 1");
  require_threads(threads);

  auto problem = problem_of(dy, x, dw, db, active);
  problem.neurons = dy.size(last);
  const auto [sizes, of_dy, of_x] = samples_of(dy, x);
  problem.samples = sizes[0];
  problem.groups = 1;
  problem.input = problem.output = {sizes[1], sizes[2], sizes[3]};
  problem.kernel = problem.stride = problem.dilation = {1, 1, 1};
  problem.padding = {0, 0, 0};
  problem.dy_strides = {of_dy[0], dy.stride(last), of_dy[1], of_dy[2], of_dy[3]};
  problem.x_strides = {of_x[0], x.stride(last), of_x[1], of_x[2], of_x[3]};
  problem.dw_strides = {dw.stride(0), dw.stride(1), 1, 1, 1};
  py::gil_scoped_release release;
  cpu::conv_wgrad(problem, cpu::Isa::best, threads, split_for);
}

}  // namespace

void bind_wgrad(py::module_& m) {
  m.def("cpu_prefer_large_pages", &cpu_prefer_large_pages, py::arg("t"));
  m.def("cpu_pack_columns", &cpu_pack_columns, py::arg("dy"), py::arg("rows"), py::arg("packed"),
        py::arg("sums"), py::arg("threads"));
  m.def("cpu_zero_rows", &cpu_zero_rows, py::arg("t"), py::arg("rows"), py::arg("dim"),
        py::arg("threads"));
  m.def("cpu_linear_wgrad", &cpu_linear_wgrad, py::arg("dy"), py::arg("x"), py::arg("dw"),
        py::arg("db"), py::arg("order"), py::arg("k"), py::arg("threads"), py::arg("split_for"));
  m.def("cpu_conv_wgrad", &cpu_conv_wgrad, py::arg("dy"), py::arg("x"), py::arg("dw"),
        py::arg("db"), py::arg("order"), py::arg("k"), py::arg("stride"), py::arg("padding"),
        py::arg("dilation"), py::arg("groups"), py::arg("isa"), py::arg("threads"),
        py::arg("split_for"));
}

}  // namespace neq
