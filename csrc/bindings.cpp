#include "bindings.h"

#include <algorithm>
#include <array>

#include "cpu/conv_wgrad.h"
#include "cpu/memory.h"
#include "cpu/pack.h"
#include "cpu/similarity.h"
#include "cpu/step.h"

namespace py = pybind11;

namespace {

using neq::Ints;
using neq::pointer;
using neq::require;

void cpu_pack_columns(neq::DType dtype, uintptr_t dy, int64_t samples, int64_t neurons,
                      int64_t stride, uintptr_t rows, int64_t k, uintptr_t packed, uintptr_t sums,
                      int threads) {
  neq::check_pack(samples, neurons, stride, k);
  require(threads >= 1, "threads", threads, "at least 1");
  py::gil_scoped_release release;
  neq::cpu::pack_columns(dtype, pointer<const void>(dy), samples, neurons, stride,
                         pointer<const int64_t>(rows), k, pointer<void>(packed),
                         pointer<void>(sums), threads);
}

// One parameter: the addresses of it, its gradient, three states and its rows; neurons, width, k, and
// whether it is transposed in memory.
using Addresses = std::array<uintptr_t, 10>;

std::vector<neq::cpu::Stepped> stepped(const std::vector<Addresses>& all,
                                       const std::vector<double>& counts) {
  require(counts.empty() || counts.size() == all.size(), "counts", int64_t(counts.size()),
          "empty or one for each of " + std::to_string(all.size()) + " parameters");
  std::vector<neq::cpu::Stepped> result;
  for (size_t i = 0; i < all.size(); ++i) {
    const auto& [param, grad, first, second, largest, rows, neurons, width, k, transposed] = all[i];
    require(k <= neurons, "k", int64_t(k), "at most neurons = " + std::to_string(neurons));
    result.push_back({pointer<void>(param), pointer<const void>(grad), pointer<void>(first),
                      pointer<void>(second), pointer<void>(largest), int64_t(neurons),
                      int64_t(width), transposed != 0, pointer<const int64_t>(rows), int64_t(k),
                      counts.empty() ? 0 : counts[i]});
  }
  return result;
}

void cpu_sgd_rows(neq::DType dtype, const std::vector<Addresses>& all, double lr, double momentum,
                  double dampening, double weight_decay, bool nesterov, bool maximize, bool begin,
                  int threads) {
  require(threads >= 1, "threads", threads, "at least 1");
  const auto params = stepped(all, {});
  py::gil_scoped_release release;
  neq::cpu::sgd_rows(dtype, params,
                     {lr, momentum, dampening, weight_decay, nesterov, maximize, begin}, threads);
}

void cpu_adamw_rows(neq::DType dtype, const std::vector<Addresses>& all,
                    const std::vector<double>& counts, double lr, double beta1, double beta2,
                    double eps, double weight_decay, bool maximize, int threads) {
  require(threads >= 1, "threads", threads, "at least 1");
  const auto params = stepped(all, counts);
  py::gil_scoped_release release;
  neq::cpu::adamw_rows(dtype, params, {lr, beta1, beta2, eps, weight_decay, maximize}, threads);
}

void cpu_prefer_large_pages(uintptr_t begin, size_t bytes) {
  neq::cpu::prefer_large_pages(pointer<void>(begin), bytes);
}

// The last of up to three dimensions, preceded by what a missing one has.
neq::cpu::Size3 size3(const Ints& given, int64_t missing) {
  neq::cpu::Size3 size{missing, missing, missing};
  std::copy_backward(given.begin(), given.end(), size.end());
  return size;
}

// Of a tensor with two dimensions before its spatial ones.
neq::cpu::Strides5 strides5(const Ints& given) {
  neq::cpu::Strides5 strides{given[0], given[1]};
  std::copy_backward(given.begin() + 2, given.end(), strides.end());
  return strides;
}

const int64_t* ascending(uintptr_t rows, int64_t k, int64_t neurons) {
  const auto* row = pointer<const int64_t>(rows);
  for (int64_t j = 0; j < k; ++j)
    require(row[j] > (j ? row[j - 1] : -1) && row[j] < neurons, "rows", row[j],
            "ascending, between 0 and neurons = " + std::to_string(neurons));
  return row;
}

void cpu_conv_wgrad(neq::DType dtype, uintptr_t dy, const Ints& dy_size, const Ints& dy_strides,
                    uintptr_t x, const Ints& x_size, const Ints& x_strides, uintptr_t dw,
                    const Ints& dw_size, const Ints& dw_strides, uintptr_t db, uintptr_t rows,
                    int64_t k, const Ints& stride, const Ints& padding, const Ints& dilation,
                    int64_t groups, neq::cpu::Isa isa, int threads, int split_for) {
  const auto spatial = [](const Ints& sizes) { return Ints(sizes.begin() + 2, sizes.end()); };
  neq::check_conv(dy_size, dy_strides, x_size, x_strides, dw_size, dw_strides, stride, padding,
                  dilation, groups);
  const int64_t neurons = dy_size[1];
  const int64_t* row = ascending(rows, k, neurons);
  require(neq::cpu::has_isa(isa), "isa", int64_t(isa), "one that this processor has");
  require(threads >= 1, "threads", threads, "at least 1");
  require(split_for >= 1, "split_for", split_for, "at least 1");

  py::gil_scoped_release release;
  neq::cpu::ConvWgrad problem;
  problem.dtype = dtype;
  problem.samples = dy_size[0];
  problem.neurons = neurons;
  problem.groups = groups;
  problem.channels = dw_size[1];
  problem.input = size3(spatial(x_size), 1);
  problem.output = size3(spatial(dy_size), 1);
  problem.kernel = size3(spatial(dw_size), 1);
  problem.stride = size3(stride, 1);
  problem.padding = size3(padding, 0);
  problem.dilation = size3(dilation, 1);
  problem.dy = pointer<const void>(dy);
  problem.dy_strides = strides5(dy_strides);
  problem.x = pointer<const void>(x);
  problem.x_strides = strides5(x_strides);
  problem.dw = pointer<void>(dw);
  problem.dw_strides = strides5(dw_strides);
  problem.db = pointer<void>(db);
  problem.rows = row;
  problem.k = k;
  neq::cpu::conv_wgrad(problem, isa, threads, split_for);
}

using Pair = std::array<int64_t, 2>;

// dy [samples, neurons], x [samples, inputs], dw [neurons, inputs]: samples are the pixels of one image.
void cpu_linear_wgrad(neq::DType dtype, uintptr_t dy, const Pair& dy_size, const Pair& dy_strides,
                      uintptr_t x, const Pair& x_size, const Pair& x_strides, uintptr_t dw,
                      const Pair& dw_size, const Pair& dw_strides, uintptr_t db, uintptr_t rows,
                      int64_t k, int threads, int split_for) {
  const auto [samples, neurons] = dy_size;
  for (const int64_t size : {samples, neurons, x_size[1]})
    require(size >= 1, "a size", size, "at least 1");
  require(x_size[0] == samples, "samples of x", x_size[0], std::to_string(samples));
  require(x_size[1] == dw_size[1], "inputs of x", x_size[1], std::to_string(dw_size[1]));
  require(dw_size[0] == neurons, "neurons of dw", dw_size[0], std::to_string(neurons));
  require(threads >= 1, "threads", threads, "at least 1");
  require(split_for >= 1, "split_for", split_for, "at least 1");
  const int64_t* row = ascending(rows, k, neurons);

  py::gil_scoped_release release;
  neq::cpu::ConvWgrad problem;
  problem.dtype = dtype;
  problem.samples = problem.groups = 1;
  problem.neurons = neurons;
  problem.channels = x_size[1];
  problem.input = problem.output = {1, 1, samples};
  problem.kernel = problem.stride = problem.dilation = {1, 1, 1};
  problem.padding = {0, 0, 0};
  problem.dy = pointer<const void>(dy);
  problem.dy_strides = {0, dy_strides[1], 0, 0, dy_strides[0]};
  problem.x = pointer<const void>(x);
  problem.x_strides = {0, x_strides[1], 0, 0, x_strides[0]};
  problem.dw = pointer<void>(dw);
  problem.dw_strides = {dw_strides[0], dw_strides[1], 1, 1, 1};
  problem.db = pointer<void>(db);
  problem.rows = row;
  problem.k = k;
  neq::cpu::conv_wgrad(problem, neq::cpu::Isa::best, threads, split_for);
}

void cpu_row_similarity(neq::DType dtype, uintptr_t y, const std::array<int64_t, 4>& strides,
                        neq::DType dtype_, uintptr_t y_, const std::array<int64_t, 4>& strides_,
                        const std::array<int64_t, 4>& sizes, uintptr_t out, neq::cpu::Isa isa,
                        int threads) {
  for (const int64_t size : sizes) require(size >= 0, "a size", size, "at least 0");
  const int inner = sizes[3] > 1 ? 3 : 2;
  const bool any_stride = sizes[inner] < 2 || std::ranges::count(sizes, 0);
  for (const auto* s : {&strides, &strides_})
    require(any_stride || (*s)[inner] == 1, "innermost stride", (*s)[inner], "1");
  require(neq::cpu::has_isa(isa), "isa", int64_t(isa), "one that this processor has");
  require(threads >= 1, "threads", threads, "at least 1");
  py::gil_scoped_release release;
  neq::cpu::row_similarity({dtype, pointer<const void>(y), strides},
                           {dtype_, pointer<const void>(y_), strides_}, sizes,
                           pointer<double>(out), isa, threads);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  py::enum_<neq::DType>(m, "DType")
      .value("float32", neq::DType::float32)
      .value("float64", neq::DType::float64)
      .value("bfloat16", neq::DType::bfloat16)
      .value("float16", neq::DType::float16);
  m.def("cpu_pack_columns", &cpu_pack_columns, py::arg("dtype"), py::arg("dy"), py::arg("samples"),
        py::arg("neurons"), py::arg("stride"), py::arg("rows"), py::arg("k"), py::arg("packed"),
        py::arg("sums"), py::arg("threads"));
  m.def("cpu_prefer_large_pages", &cpu_prefer_large_pages, py::arg("begin"), py::arg("bytes"));
  m.def("cpu_sgd_rows", &cpu_sgd_rows, py::arg("dtype"), py::arg("all"), py::arg("lr"),
        py::arg("momentum"), py::arg("dampening"), py::arg("weight_decay"), py::arg("nesterov"),
        py::arg("maximize"), py::arg("begin"), py::arg("threads"));
  m.def("cpu_adamw_rows", &cpu_adamw_rows, py::arg("dtype"), py::arg("all"), py::arg("counts"),
        py::arg("lr"), py::arg("beta1"), py::arg("beta2"), py::arg("eps"),
        py::arg("weight_decay"), py::arg("maximize"), py::arg("threads"));
  py::enum_<neq::cpu::Isa>(m, "Isa")
      .value("best", neq::cpu::Isa::best)
      .value("avx512", neq::cpu::Isa::avx512)
      .value("avx2", neq::cpu::Isa::avx2)
      .value("portable", neq::cpu::Isa::portable);
  m.def("cpu_row_similarity", &cpu_row_similarity, py::arg("dtype"), py::arg("y"),
        py::arg("strides"), py::arg("dtype_"), py::arg("y_"), py::arg("strides_"),
        py::arg("sizes"), py::arg("out"), py::arg("isa"), py::arg("threads"));
  m.def("cpu_has_isa", &neq::cpu::has_isa, py::arg("isa"));
  m.def("cpu_linear_wgrad", &cpu_linear_wgrad, py::arg("dtype"), py::arg("dy"),
        py::arg("dy_size"), py::arg("dy_strides"), py::arg("x"), py::arg("x_size"),
        py::arg("x_strides"), py::arg("dw"), py::arg("dw_size"), py::arg("dw_strides"),
        py::arg("db"), py::arg("rows"), py::arg("k"), py::arg("threads"), py::arg("split_for"));
  m.def("cpu_conv_wgrad", &cpu_conv_wgrad, py::arg("dtype"), py::arg("dy"), py::arg("dy_size"),
        py::arg("dy_strides"), py::arg("x"), py::arg("x_size"), py::arg("x_strides"),
        py::arg("dw"), py::arg("dw_size"), py::arg("dw_strides"), py::arg("db"), py::arg("rows"),
        py::arg("k"), py::arg("stride"), py::arg("padding"), py::arg("dilation"),
        py::arg("groups"), py::arg("isa"), py::arg("threads"), py::arg("split_for"));
#ifdef NEQ_CUDA
  m.attr("has_cuda") = true;
  neq::bind_cuda(m);
#else
  m.attr("has_cuda") = false;
#endif
}
