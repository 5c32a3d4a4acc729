// Looks for races between the threads of the CPU kernels: built by `make sanitize` with
// ThreadSanitizer, which does not understand libgomp's barriers. So the few functions of libgomp
// that compiled OpenMP code calls are written here in pthreads, which it does understand: the same
// kernels, split among threads in the same way.
//
// Each kernel runs on several sizes with several numbers of threads, and must give the same bits.

#include <pthread.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#include "../../csrc/cpu/similarity/row_similarity.h"
#include "../../csrc/cpu/step/step.h"
#include "../../csrc/cpu/wgrad/conv_wgrad.h"
#include "../../csrc/cpu/wgrad/pack.h"
#include "../../csrc/cpu/wgrad/zero.h"

namespace {

struct Team {
  pthread_barrier_t barrier;
  int size = 1;
} team;

thread_local int me = 0;

struct Start {
  void (*run)(void*);
  void* data;
  int number;
};

void* begin(void* start) {
  const auto* s = static_cast<Start*>(start);
  me = s->number;
  s->run(s->data);
  return nullptr;
}

}  // namespace

extern "C" {

int omp_get_thread_num() { return me; }
int omp_get_num_threads() { return team.size; }
void GOMP_barrier() {
  if (team.size > 1) pthread_barrier_wait(&team.barrier);
}

void GOMP_parallel(void (*run)(void*), void* data, unsigned threads, unsigned) {
  if (threads < 2) return run(data);
  team.size = int(threads);
  pthread_barrier_init(&team.barrier, nullptr, threads);
  std::vector<pthread_t> others(threads);
  std::vector<Start> starts;
  for (unsigned i = 0; i < threads; ++i) starts.push_back({run, data, int(i)});
  for (unsigned i = 1; i < threads; ++i) pthread_create(&others[i], nullptr, begin, &starts[i]);
  run(data);
  for (unsigned i = 1; i < threads; ++i) pthread_join(others[i], nullptr);
  pthread_barrier_destroy(&team.barrier);
  team.size = 1;
}
}

namespace {

using namespace neq;
using namespace neq::cpu;
using Floats = std::vector<float>;

Floats numbers(int64_t size) {
  static unsigned state = 1;
  Floats all(size);
  for (float& x : all) x = float((state = state * 1664525 + 1013904223) >> 24) / 16 - 8;
  return all;
}

std::vector<int64_t> every_third(int64_t neurons) {
  std::vector<int64_t> rows;
  for (int64_t i = 0; i < neurons; i += 3) rows.push_back(i);
  return rows;
}

// Runs with 1 and more threads; `run` returns what it computed.
void check(const char* name, const std::function<Floats(int)>& run) {
  const Floats once = run(1);
  for (const int threads : {2, 3, 4}) {
    const Floats again = run(threads);
    if (again.size() != once.size() ||
        std::memcmp(again.data(), once.data(), once.size() * sizeof(float))) {
      std::fprintf(stderr, "%s: %d threads give other results\n", name, threads);
      std::exit(1);
    }
  }
  std::printf("%s\n", name);
}

void conv(const char* name, int64_t samples, int64_t channels, int64_t size, int64_t neurons,
          int64_t kernel, int64_t groups, bool channels_last) {
  const int64_t pixels = size * size, width = channels / groups, taps = kernel * kernel;
  const Floats dy = numbers(samples * neurons * pixels), x = numbers(samples * channels * pixels);
  const auto rows = every_third(neurons);
  const auto strides = [&](int64_t c, int64_t h, int64_t w) -> Strides5 {
    if (channels_last) return {c * h * w, 1, c * h * w, c * w, c};
    return {c * h * w, h * w, h * w, w, 1};
  };
  check(name, [&](int threads) {
    Floats out(neurons * width * taps + neurons);
    ConvWgrad p{};
    p.dtype = DType::float32;
    p.samples = samples, p.neurons = neurons, p.groups = groups, p.channels = width;
    p.input = p.output = {1, size, size};
    p.kernel = {1, kernel, kernel};
    p.stride = p.dilation = {1, 1, 1};
    p.padding = {0, kernel / 2, kernel / 2};
    p.dy = dy.data(), p.dy_strides = strides(neurons, size, size);
    p.x = x.data(), p.x_strides = strides(channels, size, size);
    p.dw = out.data(), p.dw_strides = strides(width, kernel, kernel);
    p.db = out.data() + neurons * width * taps;
    p.rows = rows.data(), p.k = int64_t(rows.size());
    conv_wgrad(p, Isa::best, threads, 4);
    return out;
  });
}

void pack(int64_t samples, int64_t neurons) {
  const Floats dy = numbers(samples * neurons);
  const auto rows = every_third(neurons);
  const int64_t k = int64_t(rows.size());
  check("pack_columns", [&](int threads) {
    Floats out((samples + 1) * k);
    pack_columns(DType::float32, dy.data(), samples, neurons, neurons, rows.data(), k, out.data(),
                 out.data() + samples * k, threads);
    return out;
  });
}

void zeros(int64_t lines, int64_t neurons, int64_t width) {
  const Floats before = numbers(lines * neurons * width);
  const std::vector<int64_t> rows = {0, 3, 4, neurons - 1};
  check("zero_rows", [&](int threads) {
    Floats out = before;
    zero_rows(out.data(), lines, neurons, width * int64_t(sizeof(float)), rows.data(),
              int64_t(rows.size()), threads);
    return out;
  });
}

void similarity(const std::array<int64_t, 4>& sizes) {
  const auto [samples, before, neurons, after] = sizes;
  const Floats y = numbers(samples * before * neurons * after);
  const Floats y_ = numbers(int64_t(y.size()));
  const std::array<int64_t, 4> strides{before * neurons * after, neurons * after, after, 1};
  check("row_similarity", [&](int threads) {
    std::vector<double> sums(3 * samples * neurons);
    row_similarity({DType::float32, y.data(), strides}, {DType::float32, y_.data(), strides}, sizes,
                   sums.data(), Isa::best, threads);
    return Floats(sums.begin(), sums.end());
  });
}

void steps(int64_t neurons, int64_t width, bool column_major) {
  const auto rows = every_third(neurons);
  const int64_t size = neurons * width, k = int64_t(rows.size());
  const Floats start = numbers(3 * size), grad = numbers(size);
  const auto run = [&](const char* name, auto step) {
    check(name, [&](int threads) {
      Floats all = start;
      for (float& x : all) x = x * x;  // a second moment is not negative
      float *const first = all.data() + size, *const second = all.data() + 2 * size;
      Parameter p{};
      p.param = all.data(), p.grad = grad.data();
      p.momentum_buffer = p.exp_avg = first, p.exp_avg_sq = second;
      p.neurons = neurons, p.width = width, p.is_column_major = column_major;
      p.rows = rows.data(), p.k = k, p.step = 1;
      step(std::vector<Parameter>{p}, threads);
      return all;
    });
  };
  run("sgd_rows", [](const auto& all, int threads) {
    sgd_rows(DType::float32, all, {0.1, 0.9, 0, 0.01, true, false, false}, threads);
  });
  run("adamw_rows", [](const auto& all, int threads) {
    adamw_rows(DType::float32, all, {0.1, 0.9, 0.99, 1e-8, 0.01, false}, threads);
  });
}

}  // namespace

int main() {
  for (const bool channels_last : {true, false}) {
    conv("conv_wgrad 3x3", 3, 32, 20, 40, 3, 1, channels_last);
    conv("conv_wgrad in a window", 3, 8, 20, 40, 3, 1, channels_last);
    conv("conv_wgrad 1x1", 4, 128, 16, 60, 1, 1, channels_last);
    conv("conv_wgrad of many channels", 1, 512, 4, 60, 3, 1, channels_last);
    conv("conv_wgrad of groups", 2, 64, 16, 64, 3, 4, channels_last);
    conv("conv_wgrad depthwise", 2, 64, 16, 64, 3, 64, channels_last);
  }
  pack(3000, 130);
  zeros(1, 9, 40000);
  zeros(60, 12, 600);
  similarity({1, 300, 100, 9});
  similarity({1, 5000, 70, 1});
  similarity({20, 1, 64, 100});
  similarity({1, 1, 300, 900});
  for (const bool column_major : {false, true}) steps(600, 200, column_major);
}
