#include "zero.h"

#include <cstring>

namespace neq::cpu {

constexpr int64_t kWorthThreads = 1 << 18;  // bytes

void zero_rows(void* data, int64_t lines, int64_t neurons, int64_t piece, const int64_t* rows,
               int64_t k, int threads) {
#pragma omp parallel for num_threads(threads) if (lines * k * piece > kWorthThreads)
  for (int64_t i = 0; i < lines * k; ++i)
    std::memset(static_cast<char*>(data) + (i / k * neurons + rows[i % k]) * piece, 0, piece);
}

}  // namespace neq::cpu
