// Products of a warpgroup (four warps, 64 rows) on sm_90a: wgmma with the left factor in registers, where a warp's 16 rows lie as
// in the fragments of tile.h, and the right factor in shared memory in rows of 128 bytes, swizzled.
#pragma once

#include "tile.h"

namespace ptv2::cuda {

// A tile of ROWS rows in panels of 64 columns, aligned to 1024 bytes: piece c of 16 bytes of row r lies at c ^ r % 8.
template <int ROWS>
struct Swizzled {
  static constexpr int PANEL = ROWS * 64;
  PTV2_DEVICE static int at(int row, int column) {
    return column / 64 * PANEL + row * 64 + ((column / 8 % 8) ^ (row % 8)) * 8 + column % 8;
  }
};

// wgmma's matrix descriptor (PTX ISA, asynchronous warpgroup instructions): 128-byte swizzle;
// `group`: bytes from 8 rows to the next 8, `panel`: from 64 columns to the next 64, read only where columns are the product's.
PTV2_DEVICE uint64_t descriptor(uint32_t shared_address, int panel, int group) {
  return (shared_address & 0x3FFFF) >> 4 | static_cast<uint64_t>(panel >> 4) << 16 | static_cast<uint64_t>(group >> 4) << 32 |
         uint64_t{1} << 62;
}

#ifndef PTV2_EMULATE

// What generic stores and cp.async wrote becomes visible to wgmma, after the next barrier to that of other threads.
PTV2_DEVICE void publish() { asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory"); }
// Registers written so far may be read, and accumulators written, by the products that follow.
PTV2_DEVICE void group_begin() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }
PTV2_DEVICE void group_end() {
  asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;\n" ::: "memory");
}

#define PTV2_D4(j) "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])
#define PTV2_D32(j) PTV2_D4(j), PTV2_D4(j + 1), PTV2_D4(j + 2), PTV2_D4(j + 3), PTV2_D4(j + 4), PTV2_D4(j + 5), PTV2_D4(j + 6), \
                    PTV2_D4(j + 7)
#define PTV2_N32 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, " \
                 "%23, %24, %25, %26, %27, %28, %29, %30, %31"
#define PTV2_N64 PTV2_N32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, " \
                 "%51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// d [64, N] = a [64, 16] b [16, N], plus d if `add`; b lies as [N, 16] (TRANSPOSED 0) or [16, N] (TRANSPOSED 1) in shared memory.
// Sums that start at nothing are not zeroed before: such a write could come between the fence and the product.
template <class E, int TRANSPOSED>
struct GroupProduct;
#define PTV2_GROUP_PRODUCT(E, name)                                                                                            \
  template <int TRANSPOSED>                                                                                                    \
  struct GroupProduct<E, TRANSPOSED> {                                                                                         \
    PTV2_DEVICE static void add(float (&d)[8][4], const uint32_t (&a)[4], uint64_t b, int more) {                              \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\nwgmma.mma_async.sync.aligned.m64n64k16.f32." name "." name       \
                   " {" PTV2_N32 "}, {%32, %33, %34, %35}, %36, p, 1, 1, %38;\n}\n" : PTV2_D32(0)                              \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(more), "n"(TRANSPOSED));                          \
    }                                                                                                                          \
    PTV2_DEVICE static void add(float (&d)[16][4], const uint32_t (&a)[4], uint64_t b, int more) {                             \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\nwgmma.mma_async.sync.aligned.m64n128k16.f32." name "." name      \
                   " {" PTV2_N64 "}, {%64, %65, %66, %67}, %68, p, 1, 1, %70;\n}\n" : PTV2_D32(0), PTV2_D32(8)                 \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(more), "n"(TRANSPOSED));                          \
    }                                                                                                                          \
  };
PTV2_GROUP_PRODUCT(Bf16, "bf16")
PTV2_GROUP_PRODUCT(Fp16, "f16")
#undef PTV2_GROUP_PRODUCT
#undef PTV2_N64
#undef PTV2_N32
#undef PTV2_D32
#undef PTV2_D4

template <class E, int TRANSPOSED, int COLUMNS>
PTV2_DEVICE void group_multiply(float (&d)[COLUMNS][4], const uint32_t (&a)[4], uint64_t b, bool add) {
  GroupProduct<E, TRANSPOSED>::add(d, a, b, add);
}

#endif

}  // namespace ptv2::cuda
