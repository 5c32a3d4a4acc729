#pragma once

#include <cstdlib>
#include <string>

#if defined(__x86_64__) && defined(__GNUC__)
#define NEQ_X86 1
#endif

namespace neq::cpu {

// Of the instructions that this processor has, ATEN_CPU_CAPABILITY bars the wider ones, as in torch.
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

}  // namespace neq::cpu
