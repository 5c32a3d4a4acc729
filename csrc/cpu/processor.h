#pragma once

#include <cstdlib>
#include <string>

#include "element.h"

namespace neq::cpu {

// Of the instructions that this processor has, ATEN_CPU_CAPABILITY bars the wider ones, as in
// torch.
struct Processor {
  bool avx2 = false, avx512 = false;

  Processor() {
#ifdef NEQ_X86
    const char* variable = std::getenv("ATEN_CPU_CAPABILITY");
    const std::string most = variable ? variable : "avx512";
    avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && most != "default";
    avx512 = avx2 && __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
             __builtin_cpu_supports("bmi2") && most != "avx2";
#endif
  }
};

enum class Isa { best, avx512, avx2, portable };

inline bool has_isa(Isa isa) {
#ifdef NEQ_X86
  if (isa == Isa::avx512)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (isa == Isa::avx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return isa == Isa::best || isa == Isa::portable;
}

// The instructions meant by `isa`.
inline Isa chosen(Isa isa) {
  static const Processor processor;
  if (isa != Isa::best) return isa;
  return processor.avx512 ? Isa::avx512 : processor.avx2 ? Isa::avx2 : Isa::portable;
}

}  // namespace neq::cpu
