#include <algorithm>
#include <array>

#include "bindings.h"
#include "cpu/step/step.h"

namespace py = pybind11;

namespace neq {
namespace {

// What a step reads and writes, as the tuples of the same fields in Python: in each list one tensor
// for each parameter, or none in an optional one.
using Tensors = std::vector<Tensor>;

template <class Lists>
struct Field {
  const char* name;
  Tensors Lists::* list;
  bool optional = false;
};

struct SGDLists {
  Tensors params, grads, momentum_buffers, orders, counts;

  static constexpr std::array<Field<SGDLists>, 5> fields() {
    return {{{"params", &SGDLists::params},
             {"grads", &SGDLists::grads},
             {"momentum_buffers", &SGDLists::momentum_buffers, true},
             {"orders", &SGDLists::orders},
             {"counts", &SGDLists::counts}}};
  }
};

struct AdamWLists {
  Tensors params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, orders, counts;

  static constexpr std::array<Field<AdamWLists>, 8> fields() {
    return {{{"params", &AdamWLists::params},
             {"grads", &AdamWLists::grads},
             {"exp_avgs", &AdamWLists::exp_avgs},
             {"exp_avg_sqs", &AdamWLists::exp_avg_sqs},
             {"max_exp_avg_sqs", &AdamWLists::max_exp_avg_sqs, true},
             {"steps", &AdamWLists::steps},
             {"orders", &AdamWLists::orders},
             {"counts", &AdamWLists::counts}}};
  }
};

template <class Lists>
Lists lists_of(const py::tuple& given) {
  constexpr auto fields = Lists::fields();
  if (given.size() != fields.size()) {
    std::string names;
    for (const auto& field : fields) names += (names.empty() ? "" : ", ") + std::string(field.name);
    refuse("lists", int64_t(given.size()), "the " + std::to_string(fields.size()) + ": " + names);
  }
  Lists lists;
  for (size_t i = 0; i < fields.size(); ++i) {
    py::detail::make_caster<Tensors> caster;
    if (!caster.load(given[i], true))
      throw py::type_error(std::string(fields[i].name) + " must be a list of tensors");
    Tensors& list = lists.*fields[i].list;
    list = py::detail::cast_op<Tensors&&>(std::move(caster));
    const size_t wanted = lists.params.size();
    if (list.size() != wanted && !(fields[i].optional && list.empty()))
      refuse(fields[i].name, int64_t(list.size()),
             "one tensor for each of " + std::to_string(wanted) + " params");
  }
  return lists;
}

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

// The memory of the gradient or a state of params[i]. Null if the list is empty.
template <class Lists>
void* like_param(const Lists& lists, size_t i, const Tensors& list) {
  if (list.empty()) return nullptr;
  require_cpu(list[i]);
  require(same_layout(lists.params[i], list[i]), "gradient and state",
          "like their parameter in memory");
  return list[i].data();
}

// The parameters without their states.
template <class Lists>
std::vector<cpu::Parameter> parameters_of(const Lists& lists) {
  std::vector<cpu::Parameter> result(lists.params.size());
  for (size_t i = 0; i < result.size(); ++i) {
    const Tensor &p = lists.params[i], &order = lists.orders[i], &count = lists.counts[i];
    require_cpu(p, order, count);
    require(p.dims() >= 1, "dimensions of a parameter", p.dims(), "at least 1");
    require(p.dtype() == lists.params[0].dtype(), "parameters", "of one dtype");
    require(is_steppable(p), "a parameter", "in memory neuron by neuron, or column-major");
    const int64_t neurons = p.size(0), k = int64_t(count.value());
    require_order(order, neurons);
    require_between("count", k, 0, neurons);
    cpu::Parameter& to = result[i];
    to.param = p.data();
    to.grad = like_param(lists, i, lists.grads);
    to.neurons = neurons;
    to.width = p.numel() / std::max<int64_t>(neurons, 1);
    to.is_column_major = is_column_major(p);
    to.rows = order.template data<const int64_t>();
    to.k = k;
  }
  return result;
}

void cpu_sgd_rows(const py::tuple& tuple, double lr, double momentum, double dampening,
                  double weight_decay, bool nesterov, bool maximize, bool first, int threads) {
  const auto lists = lists_of<SGDLists>(tuple);
  require(momentum == 0 || !lists.momentum_buffers.empty() || lists.params.empty(),
          "momentum_buffers", "given with momentum");
  auto params = parameters_of(lists);
  for (size_t i = 0; i < params.size(); ++i)
    params[i].momentum_buffer = like_param(lists, i, lists.momentum_buffers);
  require_threads(threads);
  if (params.empty()) return;
  py::gil_scoped_release release;
  cpu::sgd_rows(lists.params[0].dtype(), params,
                {lr, momentum, dampening, weight_decay, nesterov, maximize, first}, threads);
}

void cpu_adamw_rows(const py::tuple& tuple, double lr, double beta1, double beta2, double eps,
                    double weight_decay, bool maximize, int threads) {
  const auto lists = lists_of<AdamWLists>(tuple);
  auto params = parameters_of(lists);
  for (size_t i = 0; i < params.size(); ++i) {
    params[i].exp_avg = like_param(lists, i, lists.exp_avgs);
    params[i].exp_avg_sq = like_param(lists, i, lists.exp_avg_sqs);
    params[i].max_exp_avg_sq = like_param(lists, i, lists.max_exp_avg_sqs);
    require_cpu(lists.steps[i]);
    params[i].step = lists.steps[i].value();
  }
  require_threads(threads);
  if (params.empty()) return;
  py::gil_scoped_release release;
  cpu::adamw_rows(lists.params[0].dtype(), params, {lr, beta1, beta2, eps, weight_decay, maximize},
                  threads);
}

}  // namespace

void bind_step(py::module_& m) {
  m.def("cpu_sgd_rows", &cpu_sgd_rows, py::arg("lists"), py::arg("lr"), py::arg("momentum"),
        py::arg("dampening"), py::arg("weight_decay"), py::arg("nesterov"), py::arg("maximize"),
        py::arg("first"), py::arg("threads"));
  m.def("cpu_adamw_rows", &cpu_adamw_rows, py::arg("lists"), py::arg("lr"), py::arg("beta1"),
        py::arg("beta2"), py::arg("eps"), py::arg("weight_decay"), py::arg("maximize"),
        py::arg("threads"));
}

}  // namespace neq
