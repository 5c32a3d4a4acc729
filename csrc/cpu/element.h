#pragma once

#include <bit>
#include <cstdint>

#include "../dtype.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define NEQ_X86 1
#endif

#define NEQ_INLINE inline __attribute__((always_inline))

namespace neq::cpu {

// The dtypes as kernels read them: packing moves Bits, arithmetic needs the value.
struct Half {
  using Bits = uint16_t;
  using Sum = float;
  static NEQ_INLINE float value(uint16_t h) {
    // Shifted into place, the exponent is 112 too small; infinity and NaN need all its bits set.
    uint32_t magnitude = uint32_t(h & 0x7fff) << 13;
    uint32_t bits = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) * 0x1p112f);
    bits |= (h & 0x7c00) == 0x7c00 ? 0x7f800000u | magnitude : 0u;
    return std::bit_cast<float>(bits | uint32_t(h & 0x8000) << 16);
  }
};
struct BFloat16 {
  using Bits = uint16_t;
  using Sum = float;
  static NEQ_INLINE float value(uint16_t h) { return std::bit_cast<float>(uint32_t(h) << 16); }
};
struct Float {
  using Bits = uint32_t;
  using Sum = float;
  static NEQ_INLINE float value(uint32_t bits) { return std::bit_cast<float>(bits); }
};
struct Double {
  using Bits = uint64_t;
  using Sum = double;
  static NEQ_INLINE double value(uint64_t bits) { return std::bit_cast<double>(bits); }
};

}  // namespace neq::cpu
