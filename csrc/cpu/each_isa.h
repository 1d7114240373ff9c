// Compiles the kernels of one file once per instruction set.
//
//   #define SEGFAST_FILE "channel_shuffle.cpp"
//   #include "each_isa.h"        // includes this very file three times with SEGFAST_KERNELS defined
//   #ifdef SEGFAST_KERNELS
//   namespace segfast::SEGFAST_ISA { kernels over vec.h }
//   #else
//   launchers: SEGFAST_CALL(kernel<T>)(...) picks the set at run time
//   #endif
//
// With SEGFAST_LOW defined before, a fourth time for the processors with dot products of bfloat16 and int8, whose macro
// SEGFAST_DOT is then 1; its launchers call SEGFAST_CALL_LOW. With SEGFAST_TILES defined before, once more for those with matrix
// tiles, whose macro SEGFAST_AMX is then 1; SEGFAST_TILES_OR calls them.
//
// Kernels call nothing from the standard library's templates: such an instantiation would be shared between the sets.
#ifndef SEGFAST_KERNELS
#include <cmath>
#include <cstring>
#include <type_traits>
#include <utility>

#include "../common.h"

#define SEGFAST_KERNELS
#define SEGFAST_DOT 0
#define SEGFAST_AMX 0
#define SEGFAST_ISA portable
#define SEGFAST_BYTES 16
#include "vec.h"
#include SEGFAST_FILE
#undef SEGFAST_ISA
#undef SEGFAST_BYTES

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#define SEGFAST_ISA avx2
#define SEGFAST_BYTES 32
#include "vec.h"
#include SEGFAST_FILE
#undef SEGFAST_ISA
#undef SEGFAST_BYTES
#ifdef __clang__
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")
#endif
#define SEGFAST_ISA avx512
#define SEGFAST_BYTES 64
#include "vec.h"
#include SEGFAST_FILE
#undef SEGFAST_ISA
#undef SEGFAST_BYTES
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#ifdef SEGFAST_LOW
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni")
#endif
#define SEGFAST_ISA avx512bf16
#define SEGFAST_BYTES 64
#undef SEGFAST_DOT
#define SEGFAST_DOT 1
#include "vec.h"
#include SEGFAST_FILE
#undef SEGFAST_ISA
#undef SEGFAST_BYTES
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
#if defined(SEGFAST_TILES) && SEGFAST_HAS_AMX
#ifdef __clang__
#pragma clang attribute push(                                                                                          \
    __attribute__((                                                                                                    \
        target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni,amx-tile,amx-bf16,amx-int8"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni,amx-tile,amx-bf16,amx-int8")
#endif
#define SEGFAST_ISA amx
#define SEGFAST_BYTES 64
#undef SEGFAST_DOT
#undef SEGFAST_AMX
#define SEGFAST_DOT 1
#define SEGFAST_AMX 1
#include "vec.h"
#include SEGFAST_FILE
#undef SEGFAST_ISA
#undef SEGFAST_BYTES
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
#endif
#undef SEGFAST_DOT
#undef SEGFAST_AMX
#undef SEGFAST_KERNELS
#endif
