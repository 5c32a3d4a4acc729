#include "pack.h"

#include <algorithm>
#include <bit>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "../element.h"
#include "../processor.h"

#ifdef NEQ_X86
#include <immintrin.h>
#endif

namespace neq::cpu {
namespace {

// Consecutive entries of `rows` that ascend and lie among `lanes` adjacent columns: bit i of mask
// stands for column + i. They are packed to `out` and the following columns. Every sample is packed
// by the same list of blocks.
struct Block {
  int64_t column;
  int64_t out;
  uint64_t mask;
};

std::vector<Block> blocks_of(const int64_t* rows, int64_t k, int64_t neurons, int64_t lanes) {
  std::vector<Block> blocks;
  blocks.reserve(std::min(k, ceil_div(neurons, lanes)));
  for (int64_t j = 0; j < k; ++j) {
    const int64_t row = rows[j];
    if (row < 0 || row >= neurons)
      throw std::invalid_argument("rows must lie in [0, " + std::to_string(neurons) + "), got " +
                                  std::to_string(row) + " at position " + std::to_string(j));
    // Aligned, and never past the end: a vector load of the whole block must stay in the sample.
    if (j == 0 || row <= rows[j - 1] || row - blocks.back().column >= lanes)
      blocks.push_back({std::min(row / lanes * lanes, neurons - lanes), j, 0});
    blocks.back().mask |= uint64_t(1) << (row - blocks.back().column);
  }
  return blocks;
}

template <class T>
struct Matrix {
  const T* dy;
  int64_t stride;
  const std::vector<Block>& blocks;
  int64_t lanes;
  T* packed;
  int64_t k;
};

constexpr int64_t kMaxLanes = 64;  // of a block: the bits of its mask

// Each instruction set's way to compress the masked ones of `lanes` elements at src to dst. `room`
// is the number of elements from dst to the end of the packed sample.
struct Portable {
  template <class T>
  static constexpr int64_t lanes = kMaxLanes;

  template <class From, class To>
  static NEQ_INLINE void compress(const From* src, uint64_t mask, To* dst, int64_t) {
    for (; mask; mask &= mask - 1) *dst++ = To(src[std::countr_zero(mask)]);
  }
};

#ifdef NEQ_X86
// indices[mask] lists the set bits of mask, each as Parts indices of parts of an element.
template <class Index, int Lanes, int Parts>
struct Table {
  alignas(32) Index indices[1 << Lanes][Lanes * Parts];
  constexpr Table() : indices{} {
    for (int mask = 0; mask < 1 << Lanes; ++mask) {
      int out = 0;
      for (int lane = 0; lane < Lanes; ++lane)
        for (int part = 0; part < Parts && (mask >> lane & 1); ++part)
          indices[mask][out++] = Index(lane * Parts + part);
    }
  }
};

struct Avx2 {
  // 8 elements of 16 bits are what one byte shuffle of a small table can compress.
  template <class T>
  static constexpr int64_t lanes = sizeof(T) == 8 ? 4 : 8;

  static constexpr Table<uint32_t, 8, 1> words{};
  static constexpr Table<uint32_t, 4, 2> pairs{};
  static constexpr Table<uint8_t, 8, 2> bytes{};

  template <class T>
  NEQ_TARGET(NEQ_AVX2)
  static inline void compress(const T* src, uint64_t mask, T* dst, int64_t room) {
    // Stores the whole vector. What it writes beyond the set bits, later blocks of the sample
    // overwrite; in the last blocks of a sample there is no room for it.
    if (room < lanes<T>) {
      Portable::compress(src, mask, dst, room);
    } else if constexpr (sizeof(T) == 2) {
      __m128i order = _mm_load_si128((const __m128i*)bytes.indices[mask]);
      __m128i vector = _mm_loadu_si128((const __m128i*)src);
      _mm_storeu_si128((__m128i*)dst, _mm_shuffle_epi8(vector, order));
    } else {
      const uint32_t* indices = sizeof(T) == 4 ? words.indices[mask] : pairs.indices[mask];
      __m256i order = _mm256_load_si256((const __m256i*)indices);
      __m256i vector = _mm256_loadu_si256((const __m256i*)src);
      _mm256_storeu_si256((__m256i*)dst, _mm256_permutevar8x32_epi32(vector, order));
    }
  }
};

struct Avx512 {
  template <class T>
  static constexpr int64_t lanes = 64 / sizeof(T);

  template <class T>
  NEQ_TARGET(NEQ_AVX512_VBMI2)
  static inline void compress(const T* src, uint64_t mask, T* dst, int64_t) {
    // A masked load may reach past the end of a short sample. Compressing to memory is slow on some
    // processors, to a register on none.
    uint64_t head = _bzhi_u64(~uint64_t(0), std::popcount(mask));
    if constexpr (sizeof(T) == 2) {
      __m512i vector = _mm512_maskz_loadu_epi16(mask, src);
      _mm512_mask_storeu_epi16(dst, head, _mm512_maskz_compress_epi16(mask, vector));
    } else if constexpr (sizeof(T) == 4) {
      __m512i vector = _mm512_maskz_loadu_epi32(mask, src);
      _mm512_mask_storeu_epi32(dst, head, _mm512_maskz_compress_epi32(mask, vector));
    } else {
      __m512i vector = _mm512_maskz_loadu_epi64(mask, src);
      _mm512_mask_storeu_epi64(dst, head, _mm512_maskz_compress_epi64(mask, vector));
    }
  }
};
#endif

// sums[lane] += the sum over Count samples of src[lane].
template <class Element, int Count>
NEQ_INLINE void add_samples(const typename Element::Bits* src, int64_t stride, int64_t lanes,
                            typename Element::Sum* sums) {
  for (int64_t lane = 0; lane < lanes; ++lane) {
    typename Element::Sum sum = 0;
    for (int i = 0; i < Count; ++i) sum += Element::value(src[i * stride + lane]);
    sums[lane] += sum;
  }
}

// Packs samples [begin, begin + Count) and, for each lane of each block, adds their sum to
// sums [blocks, lanes]. The Count loads of a block are streams that the hardware prefetcher
// follows, and its sums stay in registers.
template <class Isa, class Element, int Count>
NEQ_INLINE void pack_samples(const Matrix<typename Element::Bits>& m, int64_t begin,
                             typename Element::Sum* sums) {
  constexpr int64_t all_lanes = Isa::template lanes<typename Element::Bits>;
  const auto* dy = m.dy + begin * m.stride;
  auto* packed = m.packed + begin * m.k;
  for (const Block& block : m.blocks) {
    const auto* src = dy + block.column;
    for (int i = 0; i < Count; ++i)
      Isa::compress(src + i * m.stride, block.mask, packed + i * m.k + block.out, m.k - block.out);
    if (!sums) continue;
    if (m.lanes == all_lanes)  // a trip count that the compiler knows
      add_samples<Element, Count>(src, m.stride, all_lanes, sums);
    else
      add_samples<Element, Count>(src, m.stride, m.lanes, sums);
    sums += m.lanes;
  }
}

constexpr int kGroup = 8;

template <class Isa, class Element>
NEQ_INLINE void pack_chunk(const Matrix<typename Element::Bits>& m, int64_t begin, int64_t end,
                           typename Element::Sum* sums) {
  for (; begin + kGroup <= end; begin += kGroup) pack_samples<Isa, Element, kGroup>(m, begin, sums);
  for (; begin < end; ++begin) pack_samples<Isa, Element, 1>(m, begin, sums);
}

template <class Element>
using Kernel = void (*)(const Matrix<typename Element::Bits>&, int64_t, int64_t,
                        typename Element::Sum*);

template <class Element>
void pack_portable(const Matrix<typename Element::Bits>& m, int64_t begin, int64_t end,
                   typename Element::Sum* sums) {
  pack_chunk<Portable, Element>(m, begin, end, sums);
}

#ifdef NEQ_X86
template <class Element>
NEQ_TARGET(NEQ_AVX2)
void pack_avx2(const Matrix<typename Element::Bits>& m, int64_t begin, int64_t end,
               typename Element::Sum* sums) {
  pack_chunk<Avx2, Element>(m, begin, end, sums);
}

template <class Element>
NEQ_TARGET(NEQ_AVX512_VBMI2)
void pack_avx512(const Matrix<typename Element::Bits>& m, int64_t begin, int64_t end,
                 typename Element::Sum* sums) {
  pack_chunk<Avx512, Element>(m, begin, end, sums);
}
#endif

// The kernel of the widest instructions for samples of `neurons` elements, and the lanes of a
// block.
template <class Element>
std::pair<Kernel<Element>, int64_t> kernel_for(int64_t neurons) {
#ifdef NEQ_X86
  const cpu::Isa best = best_isa();
  using T = typename Element::Bits;
  if (best == cpu::Isa::avx512) return {pack_avx512<Element>, std::min(neurons, Avx512::lanes<T>)};
  if (best == cpu::Isa::avx2 && neurons >= Avx2::lanes<T>)
    return {pack_avx2<Element>, Avx2::lanes<T>};
#endif
  return {pack_portable<Element>, std::min(neurons, kMaxLanes)};
}

template <class Element>
void pack(const void* dy, int64_t samples, int64_t neurons, int64_t stride, const int64_t* rows,
          int64_t k, void* packed, void* sums, int threads) {
  using T = typename Element::Bits;
  using Sum = typename Element::Sum;
  auto [kernel, lanes] = kernel_for<Element>(neurons);
  const std::vector<Block> blocks = blocks_of(rows, k, neurons, lanes);
  const Matrix<T> matrix{(const T*)dy, stride, blocks, lanes, (T*)packed, k};

  // One thread sums a chunk of samples, and the chunks are added up in order afterwards: the bits
  // depend on the shape alone, not on the number of threads.
  const int64_t chunk = std::max<int64_t>(16, ceil_div(ceil_div(samples, 64), kGroup) * kGroup);
  const int64_t chunks = ceil_div(samples, chunk);
  const int64_t n_blocks = int64_t(blocks.size());
  const int64_t width = n_blocks * lanes;
  std::vector<Sum> partial(sums ? chunks * width : 0);  // [chunks, blocks, lanes]

  // Waking a thread costs microseconds: each should move at least 32 KiB.
  const int64_t bytes = samples * width * int64_t(sizeof(T));
  const int team = int(std::clamp<int64_t>(bytes >> 15, 1, std::min<int64_t>(threads, chunks)));
#pragma omp parallel num_threads(team) if (team > 1)
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < chunks; ++i)
      kernel(matrix, i * chunk, std::min(samples, (i + 1) * chunk),
             sums ? partial.data() + i * width : nullptr);
    if (sums) {
#pragma omp for schedule(static)
      for (int64_t b = 0; b < n_blocks; ++b) {
        double total[kMaxLanes] = {};  // in float, most of the rounding would happen here
        for (int64_t i = 0; i < chunks; ++i)
          for (int64_t lane = 0; lane < lanes; ++lane)
            total[lane] += partial[i * width + b * lanes + lane];
        Portable::compress(total, blocks[b].mask, (Sum*)sums + blocks[b].out, lanes);
      }
    }
  }
}

}  // namespace

void pack_columns(DType dtype, const void* dy, int64_t samples, int64_t neurons, int64_t stride,
                  const int64_t* rows, int64_t k, void* packed, void* sums, int threads) {
  const auto run = dtype == DType::float32    ? pack<Float>
                   : dtype == DType::float64  ? pack<Double>
                   : dtype == DType::bfloat16 ? pack<BFloat16>
                                              : pack<Half>;
  run(dy, samples, neurons, stride, rows, k, packed, sums, threads);
}

}  // namespace neq::cpu
