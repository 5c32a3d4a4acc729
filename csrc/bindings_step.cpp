#include <algorithm>
#include <array>

#include "bindings.h"
#include "cpu/step/step.h"

namespace py = pybind11;

namespace neq {
namespace {

using Tensors = std::vector<Tensor>;

// Is a weight [neurons, inputs] stored as [inputs, neurons], as GPT-2 has it?
bool is_column_major(const Tensor& t) {
  return t.dims() == 2 && !t.is_contiguous() && t.stride(0) == 1 && t.stride(1) == t.size(0);
}

// Is each neuron of a parameter contiguous, or is it column-major?
bool is_steppable(const Tensor& p) {
  const bool outermost = p.size(0) < 2 || p.stride(0) * p.size(0) == p.numel();
  return p.numel() == 0 || is_column_major(p) || (p.fills_its_memory() && outermost);
}

bool same_layout(const Tensor& a, const Tensor& b) {
  if (!std::ranges::equal(a.sizes(), b.sizes()) || a.dtype() != b.dtype()) return false;
  for (int d = 0; d < a.dims() && a.numel() > 0; ++d)
    if (a.size(d) > 1 && a.stride(d) != b.stride(d)) return false;
  return true;
}

// The parameters as the kernel takes them. Lists of states may be empty.
std::vector<cpu::Parameter> parameters_of(const Tensors& params, const Tensors& grads,
                                          const std::array<const Tensors*, 4>& states,
                                          const Tensors& orders, const Tensors& counts) {
  const auto one_each = [&](const Tensors& list) {
    require(list.size() == params.size(), "a list", int64_t(list.size()),
            "one tensor for each of " + std::to_string(params.size()) + " parameters");
  };
  for (const Tensors* list : {&grads, &orders, &counts}) one_each(*list);
  for (const Tensors* list : states)
    if (!list->empty()) one_each(*list);
  std::vector<cpu::Parameter> result;
  for (size_t i = 0; i < params.size(); ++i) {
    const Tensor& p = params[i];
    const auto like_p = [&](const Tensor& t) {
      require_cpu(p, t);
      require(same_layout(p, t), "gradient and state", "like their parameter in memory");
      return t.data();
    };
    const auto state = [&](const Tensors& list) {
      return list.empty() ? nullptr : like_p(list[i]);
    };
    require(p.dims() >= 1, "dimensions of a parameter", p.dims(), "at least 1");
    require(p.dtype() == params[0].dtype(), "parameters", "of one dtype");
    require(is_steppable(p), "a parameter", "in memory neuron by neuron, or column-major");
    require_cpu(orders[i], counts[i]);
    const int64_t neurons = p.size(0), k = int64_t(counts[i].value());
    require_order(orders[i], neurons);
    require_between("count", k, 0, neurons);
    result.push_back({p.data(), like_p(grads[i]), state(*states[0]), state(*states[1]),
                      state(*states[2]), state(*states[3]), neurons,
                      p.numel() / std::max<int64_t>(neurons, 1), is_column_major(p),
                      orders[i].data<const int64_t>(), k, 0});
  }
  return result;
}

void cpu_sgd_rows(const Tensors& params, const Tensors& grads, const Tensors& momentum_buffers,
                  const Tensors& orders, const Tensors& counts, double lr, double momentum,
                  double dampening, double weight_decay, bool nesterov, bool maximize, bool first,
                  int threads) {
  require(momentum == 0 || !momentum_buffers.empty() || params.empty(), "momentum_buffers",
          "given with momentum");
  const Tensors none;
  const auto all =
      parameters_of(params, grads, {&momentum_buffers, &none, &none, &none}, orders, counts);
  require_threads(threads);
  if (all.empty()) return;
  py::gil_scoped_release release;
  cpu::sgd_rows(params[0].dtype(), all,
                {lr, momentum, dampening, weight_decay, nesterov, maximize, first}, threads);
}

void cpu_adamw_rows(const Tensors& params, const Tensors& grads, const Tensors& exp_avgs,
                    const Tensors& exp_avg_sqs, const Tensors& max_exp_avg_sqs,
                    const Tensors& steps, const Tensors& orders, const Tensors& counts, double lr,
                    double beta1, double beta2, double eps, double weight_decay, bool maximize,
                    int threads) {
  const Tensors none;
  auto all = parameters_of(params, grads, {&none, &exp_avgs, &exp_avg_sqs, &max_exp_avg_sqs},
                           orders, counts);
  for (const Tensors* moments : {&exp_avgs, &exp_avg_sqs})
    require(moments->size() == all.size(), "moments", int64_t(moments->size()),
            "one of each for each parameter");
  require(steps.size() == all.size(), "steps", int64_t(steps.size()), "one for each parameter");
  for (size_t i = 0; i < all.size(); ++i) {
    require_cpu(steps[i]);
    all[i].step = steps[i].value();
  }
  require_threads(threads);
  if (all.empty()) return;
  py::gil_scoped_release release;
  cpu::adamw_rows(params[0].dtype(), all, {lr, beta1, beta2, eps, weight_decay, maximize}, threads);
}

}  // namespace

void bind_step(py::module_& m) {
  m.def("cpu_sgd_rows", &cpu_sgd_rows, py::arg("params"), py::arg("grads"),
        py::arg("momentum_buffers"), py::arg("orders"), py::arg("counts"), py::arg("lr"),
        py::arg("momentum"), py::arg("dampening"), py::arg("weight_decay"), py::arg("nesterov"),
        py::arg("maximize"), py::arg("first"), py::arg("threads"));
  m.def("cpu_adamw_rows", &cpu_adamw_rows, py::arg("params"), py::arg("grads"), py::arg("exp_avgs"),
        py::arg("exp_avg_sqs"), py::arg("max_exp_avg_sqs"), py::arg("steps"), py::arg("orders"),
        py::arg("counts"), py::arg("lr"), py::arg("beta1"), py::arg("beta2"), py::arg("eps"),
        py::arg("weight_decay"), py::arg("maximize"), py::arg("threads"));
}

}  // namespace neq
