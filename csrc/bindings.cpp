#include "bindings.h"

#include <algorithm>
#include <array>

#include "cpu/buffer.h"
#include "cpu/similarity/row_similarity.h"
#include "cpu/step/step.h"
#include "cpu/wgrad/conv_wgrad.h"
#include "cpu/wgrad/pack.h"
#include "cpu/wgrad/zero.h"

namespace py = pybind11;

namespace {

using neq::Ints;
using neq::require;
using neq::require_cpu;
using neq::require_indices;
using neq::Tensor;

void require_threads(int threads) { require(threads >= 1, "threads", threads, "at least 1"); }

void cpu_pack_columns(const Tensor& dy, const Tensor& rows, const Tensor& packed,
                      const std::optional<Tensor>& sums, int threads) {
  require_cpu(dy, rows, packed, sums.value_or(packed));
  neq::check_pack(dy, rows, packed, sums);
  require_threads(threads);
  py::gil_scoped_release release;
  neq::cpu::pack_columns(dy.dtype(), dy.data(), dy.size(0), dy.size(1), dy.stride(0),
                         rows.data<const int64_t>(), rows.size(0), packed.data(),
                         sums ? sums->data() : nullptr, threads);
}

using Tensors = std::vector<Tensor>;

// Is a matrix of neurons kept as its transpose?
bool is_transposed(const Tensor& t) {
  return t.dims() == 2 && !t.is_contiguous() && t.stride(0) == 1 && t.stride(1) == t.size(0);
}

// Does each neuron of a parameter lie in one piece, or is it such a matrix?
bool can_be_stepped(const Tensor& p) {
  const bool outermost = p.size(0) < 2 || p.stride(0) * p.size(0) == p.numel();
  return p.numel() == 0 || is_transposed(p) || (p.fills_its_memory() && outermost);
}

bool lie_alike(const Tensor& a, const Tensor& b) {
  if (!std::ranges::equal(a.sizes(), b.sizes()) || a.dtype() != b.dtype()) return false;
  for (int d = 0; d < a.dims() && a.numel() > 0; ++d)
    if (a.size(d) > 1 && a.stride(d) != b.stride(d)) return false;
  return true;
}

// Of each parameter what is stepped. Lists of states may be empty; tensors of a parameter lie
// alike.
std::vector<neq::cpu::Stepped> stepped(const Tensors& params, const Tensors& grads,
                                       const std::array<const Tensors*, 3>& states,
                                       const Tensors& rows, const Tensors& counts) {
  const auto one_each = [&](const Tensors& list) {
    require(list.size() == params.size(), "a list", int64_t(list.size()),
            "one tensor for each of " + std::to_string(params.size()) + " parameters");
  };
  for (const Tensors* list : {&grads, &rows, &counts}) one_each(*list);
  for (const Tensors* list : states)
    if (!list->empty()) one_each(*list);
  std::vector<neq::cpu::Stepped> result;
  for (size_t i = 0; i < params.size(); ++i) {
    const Tensor& p = params[i];
    const auto like_p = [&](const Tensor& t) {
      require_cpu(p, t);
      require(lie_alike(p, t), "gradient and state", "like their parameter in memory");
      return t.data();
    };
    const auto state = [&](const Tensors& list) {
      return list.empty() ? nullptr : like_p(list[i]);
    };
    require(p.dims() >= 1, "dimensions of a parameter", p.dims(), "at least 1");
    require(p.dtype() == params[0].dtype(), "parameters", "of one dtype");
    require(can_be_stepped(p), "a parameter", "in memory neuron by neuron, or transposed");
    require_cpu(rows[i], counts[i]);
    const int64_t neurons = p.size(0), k = int64_t(counts[i].value());
    require_indices(rows[i]);
    require(rows[i].size(0) == neurons, "rows", rows[i].size(0), "one for each neuron");
    require(k >= 0 && k <= neurons, "count", k,
            "between 0 and neurons = " + std::to_string(neurons));
    result.push_back({p.data(), like_p(grads[i]), state(*states[0]), state(*states[1]),
                      state(*states[2]), neurons, p.numel() / std::max<int64_t>(neurons, 1),
                      is_transposed(p), rows[i].data<const int64_t>(), k, 0});
  }
  return result;
}

void cpu_sgd_rows(const Tensors& params, const Tensors& grads, const Tensors& momentum_buffers,
                  const Tensors& rows, const Tensors& counts, double lr, double momentum,
                  double dampening, double weight_decay, bool nesterov, bool maximize, bool first,
                  int threads) {
  require(momentum == 0 || !momentum_buffers.empty() || params.empty(), "momentum_buffers",
          "given with momentum");
  const Tensors none;
  const auto all = stepped(params, grads, {&momentum_buffers, &none, &none}, rows, counts);
  require_threads(threads);
  if (all.empty()) return;
  py::gil_scoped_release release;
  neq::cpu::sgd_rows(params[0].dtype(), all,
                     {lr, momentum, dampening, weight_decay, nesterov, maximize, first}, threads);
}

void cpu_adamw_rows(const Tensors& params, const Tensors& grads, const Tensors& exp_avgs,
                    const Tensors& exp_avg_sqs, const Tensors& max_exp_avg_sqs,
                    const Tensors& steps, const Tensors& rows, const Tensors& counts, double lr,
                    double beta1, double beta2, double eps, double weight_decay, bool maximize,
                    int threads) {
  auto all = stepped(params, grads, {&exp_avgs, &exp_avg_sqs, &max_exp_avg_sqs}, rows, counts);
  for (const Tensors* moments : {&exp_avgs, &exp_avg_sqs})
    require(moments->size() == all.size(), "moments", int64_t(moments->size()),
            "one of each for each parameter");
  require(steps.size() == all.size(), "steps", int64_t(steps.size()), "one for each parameter");
  for (size_t i = 0; i < all.size(); ++i) {
    require_cpu(steps[i]);
    all[i].count = steps[i].value();
  }
  require_threads(threads);
  if (all.empty()) return;
  py::gil_scoped_release release;
  neq::cpu::adamw_rows(params[0].dtype(), all, {lr, beta1, beta2, eps, weight_decay, maximize},
                       threads);
}

// Zeros for the rows of dimension `dim`. False, and nothing done, where they lie in pieces of less
// than a cache line each, or the tensor doesn't fill its memory.
bool cpu_zero_rows(const Tensor& t, const Tensor& rows, int dim, int threads) {
  require_cpu(t, rows);
  require(dim >= 0 && dim < t.dims(), "dim", dim, "a dimension of the tensor");
  require_indices(rows);
  const int64_t neurons = t.size(dim);
  const auto* row = rows.data<const int64_t>();
  for (int64_t j = 0; j < rows.size(0); ++j)
    require(row[j] >= 0 && row[j] < neurons, "rows", row[j],
            "between 0 and neurons = " + std::to_string(neurons));
  require_threads(threads);
  const int64_t piece = neurons > 1 ? t.stride(dim) : t.numel();
  const int64_t bytes = piece * bytes_of(t.dtype());
  if (bytes < neq::kLineBytes || !t.fills_its_memory()) return false;
  py::gil_scoped_release release;
  neq::cpu::zero_rows(t.data(), t.numel() / (neurons * piece), neurons, bytes, row, rows.size(0),
                      threads);
  return true;
}

void cpu_prefer_large_pages(const Tensor& t) {
  require_cpu(t);
  neq::cpu::prefer_large_pages(t.data(), t.numel() * bytes_of(t.dtype()));
}

using neq::cpu::Size3;

// The last of up to three dimensions, preceded by what a missing one has.
Size3 size3(std::span<const int64_t> given, int64_t missing) {
  Size3 size{missing, missing, missing};
  std::ranges::copy_backward(given, size.end());
  return size;
}

// Of a tensor with two dimensions before its spatial ones.
neq::cpu::Strides5 strides5(const Tensor& t) {
  neq::cpu::Strides5 strides{t.stride(0), t.stride(1)};
  std::ranges::copy_backward(t.strides().subspan(2), strides.end());
  return strides;
}

std::vector<int64_t> ascending(const Tensor& rows, int64_t k, int64_t neurons) {
  require_indices(rows);
  require(k >= 0 && k <= rows.size(0), "k", k, "between 0 and " + std::to_string(rows.size(0)));
  std::vector<int64_t> chosen(k);
  for (int64_t j = 0; j < k; ++j) {
    const int64_t row = rows.data<const int64_t>()[j];
    require(row > (j ? chosen[j - 1] : -1) && row < neurons, "rows", row,
            "ascending, between 0 and neurons = " + std::to_string(neurons));
    chosen[j] = row;
  }
  return chosen;
}

// What both kinds of layers have in common; of the sums dw and db.
neq::cpu::ConvWgrad problem_of(const Tensor& dy, const Tensor& x, const Tensor& dw,
                               const Tensor& db, const std::vector<int64_t>& rows) {
  require(dw.dtype() == neq::sum_dtype(dy.dtype()), "dw", "of the dtype of sums");
  require(dw.fills_its_memory(), "dw", "without gaps and overlaps in memory");
  neq::cpu::ConvWgrad problem{};
  problem.dtype = dy.dtype();
  problem.neurons = dw.size(0);
  problem.channels = dw.size(1);
  problem.dy = dy.data();
  problem.x = x.data();
  problem.dw = dw.data();
  problem.db = neq::bias_gradient(db, dw.dtype(), dw.size(0));
  problem.rows = rows.data();
  problem.k = int64_t(rows.size());
  return problem;
}

void cpu_conv_wgrad(const Tensor& dy, const Tensor& x, const Tensor& dw, const Tensor& db,
                    const Tensor& rows, int64_t k, const Ints& stride, const Ints& padding,
                    const Ints& dilation, int64_t groups, neq::cpu::Isa isa, int threads,
                    int split_for) {
  require_cpu(dy, x, dw, db, rows);
  neq::check_conv(dy, x, dw, stride, padding, dilation, groups);
  const auto chosen = ascending(rows, k, dw.size(0));
  require(neq::cpu::has_isa(isa), "isa", int64_t(isa), "one that this processor has");
  require(split_for >= 1, "split_for", split_for, "at least 1");
  require_threads(threads);

  auto problem = problem_of(dy, x, dw, db, chosen);
  problem.samples = dy.size(0);
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
  neq::cpu::conv_wgrad(problem, isa, threads, split_for);
}

// Several dimensions of two tensors as few as they can be in both: [images, depth, lines, pixels].
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

// dy [..., neurons], x [..., inputs], dw [neurons, inputs]: samples are the pixels of images.
void cpu_linear_wgrad(const Tensor& dy, const Tensor& x, const Tensor& dw, const Tensor& db,
                      const Tensor& rows, int64_t k, int threads, int split_for) {
  require_cpu(dy, x, dw, db, rows);
  const int last = dy.dims() - 1;
  require(last >= 0 && x.dims() == last + 1, "dimensions of x", x.dims(),
          "as many as those of dy, " + std::to_string(last + 1));
  require(dw.dims() == 2, "dimensions of dw", dw.dims(), "2");
  for (const Tensor* t : {&dy, &x})
    for (const int64_t size : t->sizes()) require(size >= 1, "a size", size, "at least 1");
  require(x.dtype() == dy.dtype(), "x", "of dy's dtype");
  require(dy.size(last) == dw.size(0), "neurons of dy", dy.size(last), std::to_string(dw.size(0)));
  require(x.size(last) == dw.size(1), "inputs of x", x.size(last), std::to_string(dw.size(1)));
  const auto chosen = ascending(rows, k, dw.size(0));
  require(split_for >= 1, "split_for", split_for, "at least 1");
  require_threads(threads);

  auto problem = problem_of(dy, x, dw, db, chosen);
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
  neq::cpu::conv_wgrad(problem, neq::cpu::Isa::best, threads, split_for);
}

void cpu_row_similarity(const Tensor& y, const Tensor& y_, const Tensor& out, neq::cpu::Isa isa,
                        int threads) {
  require_cpu(y, y_, out);
  require(y.dims() == 4 && std::ranges::equal(y.sizes(), y_.sizes()), "both outputs",
          "of one size, with 4 dimensions");
  std::array<int64_t, 4> sizes;
  std::ranges::copy(y.sizes(), sizes.begin());
  require(out.dims() == 3 && out.size(0) == 3 && out.size(1) == sizes[0] &&
              out.size(2) == sizes[2] && out.dtype() == neq::DType::float64 && out.is_contiguous(),
          "out", "contiguous float64 [3, samples, neurons]");
  const int inner = sizes[3] > 1 ? 3 : 2;
  const bool any_stride = sizes[inner] < 2 || y.numel() == 0;
  const auto output = [&](const Tensor& t) {
    require(any_stride || t.stride(inner) == 1, "innermost stride", t.stride(inner), "1");
    neq::cpu::Output output{t.dtype(), t.data(), {}};
    std::ranges::copy(t.strides(), output.strides.begin());
    return output;
  };
  const auto first = output(y), second = output(y_);
  require(neq::cpu::has_isa(isa), "isa", int64_t(isa), "one that this processor has");
  require_threads(threads);
  py::gil_scoped_release release;
  neq::cpu::row_similarity(first, second, sizes, out.data<double>(), isa, threads);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  Tensor::find_torch();
  m.def("cpu_pack_columns", &cpu_pack_columns, py::arg("dy"), py::arg("rows"), py::arg("packed"),
        py::arg("sums"), py::arg("threads"));
  m.def("cpu_prefer_large_pages", &cpu_prefer_large_pages, py::arg("t"));
  m.def("cpu_zero_rows", &cpu_zero_rows, py::arg("t"), py::arg("rows"), py::arg("dim"),
        py::arg("threads"));
  m.def("cpu_sgd_rows", &cpu_sgd_rows, py::arg("params"), py::arg("grads"),
        py::arg("momentum_buffers"), py::arg("rows"), py::arg("counts"), py::arg("lr"),
        py::arg("momentum"), py::arg("dampening"), py::arg("weight_decay"), py::arg("nesterov"),
        py::arg("maximize"), py::arg("first"), py::arg("threads"));
  m.def("cpu_adamw_rows", &cpu_adamw_rows, py::arg("params"), py::arg("grads"), py::arg("exp_avgs"),
        py::arg("exp_avg_sqs"), py::arg("max_exp_avg_sqs"), py::arg("steps"), py::arg("rows"),
        py::arg("counts"), py::arg("lr"), py::arg("beta1"), py::arg("beta2"), py::arg("eps"),
        py::arg("weight_decay"), py::arg("maximize"), py::arg("threads"));
  py::enum_<neq::cpu::Isa>(m, "Isa")
      .value("best", neq::cpu::Isa::best)
      .value("avx512", neq::cpu::Isa::avx512)
      .value("avx2", neq::cpu::Isa::avx2)
      .value("portable", neq::cpu::Isa::portable);
  m.def("cpu_row_similarity", &cpu_row_similarity, py::arg("y"), py::arg("y_"), py::arg("out"),
        py::arg("isa"), py::arg("threads"));
  m.def("cpu_has_isa", &neq::cpu::has_isa, py::arg("isa"));
  m.def("cpu_linear_wgrad", &cpu_linear_wgrad, py::arg("dy"), py::arg("x"), py::arg("dw"),
        py::arg("db"), py::arg("rows"), py::arg("k"), py::arg("threads"), py::arg("split_for"));
  m.def("cpu_conv_wgrad", &cpu_conv_wgrad, py::arg("dy"), py::arg("x"), py::arg("dw"),
        py::arg("db"), py::arg("rows"), py::arg("k"), py::arg("stride"), py::arg("padding"),
        py::arg("dilation"), py::arg("groups"), py::arg("isa"), py::arg("threads"),
        py::arg("split_for"));
#ifdef NEQ_CUDA
  m.attr("has_cuda") = true;
  neq::bind_cuda(m);
#else
  m.attr("has_cuda") = false;
#endif
}
