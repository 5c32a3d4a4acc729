#pragma once

#include <cstdlib>
#include <string>

#include "element.h"

// The instruction sets that kernels are compiled for. The features that has_isa() asks the
// processor for are those that these targets allow the compiler.
#define NEQ_AVX2 "avx2,fma"
#define NEQ_AVX512 "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl"
#define NEQ_AVX512_VBMI2 NEQ_AVX512 ",avx512vbmi2,bmi2,popcnt"

// The target of one function. In loops that the compiler vectorizes, it takes whole vectors only if
// told to, else halves of AVX-512's.
#define NEQ_TARGET(isa) __attribute__((target(isa)))
#define NEQ_TARGET_WHOLE_VECTORS(isa) __attribute__((target(isa ",prefer-vector-width=512")))

// The target of all functions that follow, up to NEQ_END_TARGET or the end of the file: gcc
// compiles templates for the target that is in force where it instantiates them, at the end.
#define NEQ_PRAGMA(...) _Pragma(#__VA_ARGS__)
#ifdef __clang__
#define NEQ_BEGIN_TARGET(isa) \
  NEQ_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define NEQ_END_TARGET NEQ_PRAGMA(clang attribute pop)
#else
#define NEQ_BEGIN_TARGET(isa) NEQ_PRAGMA(GCC target(isa, "prefer-vector-width=512"))
#define NEQ_END_TARGET
#endif

namespace neq::cpu {

enum class Isa { best, avx512, avx2, portable };

// Does this processor have the instructions?
inline bool has_isa(Isa isa) {
#ifdef NEQ_X86
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (isa == Isa::avx2) return avx2;
  if (isa == Isa::avx512)
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
  return isa == Isa::best || isa == Isa::portable;
}

// Has it what NEQ_AVX512_VBMI2 has beyond NEQ_AVX512?
inline bool has_vbmi2() {
#ifdef NEQ_X86
  return __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("bmi2");
#else
  return false;
#endif
}

// The widest instructions of this processor that ATEN_CPU_CAPABILITY allows, as in torch. AVX-512
// only with VBMI2, which pack_columns needs: so all kernels of a process use the same instructions.
inline Isa best_isa() {
  static const Isa best = [] {
    const char* variable = std::getenv("ATEN_CPU_CAPABILITY");
    const std::string allowed = variable ? variable : "";
    if (allowed == "default" || !has_isa(Isa::avx2)) return Isa::portable;
    const bool wide = has_isa(Isa::avx512) && has_vbmi2() && allowed != "avx2";
    return wide ? Isa::avx512 : Isa::avx2;
  }();
  return best;
}

// Replaces Isa::best by what it stands for.
inline Isa chosen(Isa isa) { return isa == Isa::best ? best_isa() : isa; }

}  // namespace neq::cpu
