// Matrices of two or three rows.
#pragma once

#include "core/host_device.h"

namespace regkernels {

template <class T, int D>
struct Matrix {
  T m[D][D];
};

template <class T>
REGKERNELS_HD T determinant(const Matrix<T, 2>& a) {
  return a.m[0][0] * a.m[1][1] - a.m[0][1] * a.m[1][0];
}
template <class T>
REGKERNELS_HD T determinant(const Matrix<T, 3>& a) {
  return a.m[0][0] * (a.m[1][1] * a.m[2][2] - a.m[1][2] * a.m[2][1]) -
         a.m[0][1] * (a.m[1][0] * a.m[2][2] - a.m[1][2] * a.m[2][0]) +
         a.m[0][2] * (a.m[1][0] * a.m[2][1] - a.m[1][1] * a.m[2][0]);
}

// The derivative of the determinant with respect to entry (row, column).
template <class T>
REGKERNELS_HD T cofactor(const Matrix<T, 2>& a, int row, int column) {
  const T value = a.m[1 - row][1 - column];
  return row == column ? value : -value;
}
template <class T>
REGKERNELS_HD T cofactor(const Matrix<T, 3>& a, int row, int column) {
  const int r1 = (row + 1) % 3, r2 = (row + 2) % 3;
  const int c1 = (column + 1) % 3, c2 = (column + 2) % 3;
  return a.m[r1][c1] * a.m[r2][c2] - a.m[r1][c2] * a.m[r2][c1];
}

}  // namespace regkernels
