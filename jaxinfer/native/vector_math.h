// Elementary functions of vectors, right to about two units in the last place.
//
// Reference: S. L. Moshier, Cephes Mathematical Library (1989): expf and tanhf, whose polynomials these are.

#ifndef JAXINFER_VECTOR_MATH_H
#define JAXINFER_VECTOR_MATH_H

#include "vector.h"

INLINE Vector vector_of(float value) { return value - (Vector){}; }

// A NaN of either side stays one.
INLINE Vector vector_max(Vector a, Vector b) { return vector_select((a > b) | (a != a), a, b); }

INLINE Vector vector_min(Vector a, Vector b) { return vector_select((a < b) | (a != a), a, b); }

INLINE Vector vector_abs(Vector x) { return (Vector)((Mask)x & 0x7fffffff); }

// exp(x) = 2^n · exp(r), n whole and |r| at most half of log 2.
INLINE Vector vector_exp(Vector x) {
  const Vector least = vector_of(-104.0f), most = vector_of(89.0f);  // beyond, the result is 0 or infinite
  x = vector_select(x < least, least, x);
  x = vector_select(x > most, most, x);
  const Vector rounding = vector_of(12582912.0f);  // 1.5 · 2^23: numbers of this size have no fraction
  Vector n = x * 1.44269504088896341f + rounding - rounding;
  Vector r = x - n * 0.693359375f - n * -2.12194440e-4f;
  Vector p = vector_of(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  // In two steps, since 2^n alone may be no number of this type.
  Mask whole = __builtin_convertvector(n, Mask), half = whole >> 1;
  return p * (Vector)((half + 127) << 23) * (Vector)((whole - half + 127) << 23);
}

INLINE Vector vector_logistic(Vector x) { return 1.0f / (1.0f + vector_exp(-x)); }

INLINE Vector vector_tanh(Vector x) {
  Vector size = vector_abs(x), square = x * x;
  Vector p = vector_of(-5.70498872745e-3f);
  p = p * square + 2.06390887954e-2f;
  p = p * square - 5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square - 3.33332819422e-1f;
  Vector near = p * square * x + x;
  Vector far = 1.0f - 2.0f / (vector_exp(2.0f * size) + 1.0f);
  Vector negative = -far;
  far = vector_select(x < 0, negative, far);
  return vector_select(size < 0.625f, near, far);
}

#endif
