// Vectors as long as this processor's, and how many accumulators its registers hold.

#ifndef JAXINFER_VECTOR_H
#define JAXINFER_VECTOR_H

#include <stdint.h>

#if defined(__AVX512F__)
#define LANES 16
#define TILE_ROWS 14
#elif defined(__AVX__)
#define LANES 8
#define TILE_ROWS 6
#elif defined(__aarch64__)
#define LANES 4
#define TILE_ROWS 14
#else
#define LANES 4
#define TILE_ROWS 6
#endif

// Columns of a panel of packed weights.
#define PANEL (2 * LANES)

typedef float Vector __attribute__((vector_size(LANES * sizeof(float)), aligned(sizeof(float))));

typedef int32_t Mask __attribute__((vector_size(LANES * sizeof(float)), aligned(sizeof(float))));

#define INLINE static inline __attribute__((always_inline))

// Of each lane the one value where the mask is set, else the other.
INLINE Vector vector_select(Mask mask, Vector set, Vector clear) {
  return (Vector)(((Mask)set & mask) | ((Mask)clear & ~mask));
}

#endif
