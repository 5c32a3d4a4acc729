#include "zero.h"

#include <algorithm>
#include <cstring>

namespace neq::cpu {

constexpr int64_t kThreadBytes = 128 << 10;  // that repay waking a thread

void zero_rows(void* data, int64_t lines, int64_t neurons, int64_t width, const int64_t* rows,
               int64_t k, int threads) {
  const int team = int(std::clamp<int64_t>(lines * k * width / kThreadBytes, 1, threads));
#pragma omp parallel for num_threads(team) if (team > 1)
  for (int64_t i = 0; i < lines * k; ++i)
    std::memset(static_cast<char*>(data) + (i / k * neurons + rows[i % k]) * width, 0, width);
}

}  // namespace neq::cpu
