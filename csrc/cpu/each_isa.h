// Compiles FASTMON_BODY once per instruction set, each in a namespace of its own: fastmon::portable, ::avx2, ::avx512.
// Only code of this project may stand in a body: an inline function of a library, compiled here with wider instructions,
// could be the copy the linker keeps for the whole process.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define FASTMON_X86 1
#include <immintrin.h>
#else
#define FASTMON_X86 0
#endif

#define FASTMON_FN static inline __attribute__((always_inline))

#define FASTMON_LANES 4
#define FASTMON_LEVEL 0
namespace fastmon { namespace portable {
#include "lanes.h"
#include FASTMON_BODY
} }
#undef FASTMON_LANES
#undef FASTMON_LEVEL

#if FASTMON_X86
#define FASTMON_LANES 8
#define FASTMON_LEVEL 2
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,popcnt")
namespace fastmon { namespace avx2 {
#include "lanes.h"
#include FASTMON_BODY
} }
#pragma GCC pop_options
#undef FASTMON_LANES
#undef FASTMON_LEVEL

#define FASTMON_LANES 16
#define FASTMON_LEVEL 5
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,popcnt,prefer-vector-width=512")
namespace fastmon { namespace avx512 {
#include "lanes.h"
#include FASTMON_BODY
} }
#pragma GCC pop_options
#undef FASTMON_LANES
#undef FASTMON_LEVEL
#endif

namespace fastmon {
template <class Table>
const Table& pick(Isa isa) {
#if FASTMON_X86
  if (isa == Isa::avx512) return avx512::table;
  if (isa == Isa::avx2) return avx2::table;
#endif
  (void)isa;
  return portable::table;
}
}  // namespace fastmon
