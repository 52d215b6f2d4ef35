// Batched products of small matrices, which compiled steps call in place of torch's own (metarun/engine/products.py).
//
// Models of sinusoids multiply matrices of forty rows, for which MKL takes up to twice as long. A product with a larger
// matrix is left to torch.

#include <cstdint>
#include <cstring>
#include <utility>

extern "C" {
// Torch's stable interface in C; a tensor is a handle.
int32_t aoti_torch_cpu_bmm_out(void* out, void* a, void* b);
int32_t aoti_torch_get_data_ptr(void* tensor, void** found);
int32_t aoti_torch_get_sizes(void* tensor, int64_t** found);
int32_t aoti_torch_get_strides(void* tensor, int64_t** found);
int32_t aoti_torch_get_dtype(void* tensor, int32_t* found);
int32_t aoti_torch_dtype_float32();
int32_t aoti_torch_dtype_float64();
}

namespace {

constexpr int64_t LARGEST = 64;  // of rows, columns and terms
constexpr int BYTES = 32;        // of a vector
#ifdef __AVX512VL__
constexpr int SUMS = 25;  // vectors that stay in registers, of which there are 32
#else
constexpr int SUMS = 10;
#endif

template <typename T>
struct Vector {
  typedef T Type __attribute__((vector_size(BYTES)));
  static constexpr int width = BYTES / sizeof(T);

  static Type load(const T* from) {
    Type value;
    std::memcpy(&value, from, BYTES);
    return value;
  }
  static void store(T* to, Type value) { std::memcpy(to, &value, BYTES); }
};

// A batch of matrices: entry (i, j) of matrix k is data[k * batch + i * row + j * column].
template <typename T>
struct Matrices {
  T* data;
  int64_t batch, row, column;

  Matrices transposed() const { return {data, batch, column, row}; }
};

// ROWS rows of out = a b, whose columns are COLUMNS vectors; rows of b and out are contiguous.
template <typename T, int ROWS, int COLUMNS>
inline void block(const Matrices<T>& out, const Matrices<const T>& a, const T* b, int64_t b_row, int terms) {
  typedef Vector<T> V;
  typename V::Type sum[ROWS][COLUMNS] = {}, factors[COLUMNS];
  for (int k = 0; k < terms; ++k) {
#pragma GCC unroll 8
    for (int c = 0; c < COLUMNS; ++c) factors[c] = V::load(b + k * b_row + c * V::width);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      const T factor = a.data[r * a.row + k * a.column];
#pragma GCC unroll 8
      for (int c = 0; c < COLUMNS; ++c) sum[r][c] += factor * factors[c];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < COLUMNS; ++c) V::store(out.data + r * out.row + c * V::width, sum[r][c]);
  }
}

template <typename T, int COLUMNS>
inline void all_rows(Matrices<T> out, Matrices<const T> a, const T* b, int64_t b_row, int rows, int terms) {
  constexpr int ROWS = SUMS / COLUMNS < 6 ? SUMS / COLUMNS : 6;
  int left = rows;
  const auto next = [&](int done) {
    out.data += done * out.row;
    a.data += done * a.row;
    left -= done;
  };
  for (; left >= ROWS; next(ROWS)) block<T, ROWS, COLUMNS>(out, a, b, b_row, terms);
  for (; left >= 2; next(2)) block<T, 2, COLUMNS>(out, a, b, b_row, terms);
  if (left) block<T, 1, COLUMNS>(out, a, b, b_row, terms);
}

// out = a b for a single pair, whose columns are whole vectors; rows of b and out are contiguous.
template <typename T>
void product(Matrices<T> out, const Matrices<const T>& a, const T* b, int64_t b_row, int rows, int columns, int terms) {
  constexpr int width = Vector<T>::width;
  int left = columns;
  const auto next = [&](int done) {
    out.data += done;
    b += done;
    left -= done;
  };
  for (; left >= 5 * width; next(5 * width)) all_rows<T, 5>(out, a, b, b_row, rows, terms);
  for (; left >= 2 * width; next(2 * width)) all_rows<T, 2>(out, a, b, b_row, rows, terms);
  if (left) all_rows<T, 1>(out, a, b, b_row, rows, terms);
}

#ifdef __has_builtin
#if __has_builtin(__builtin_shufflevector)
#define HAS_SHUFFLES
#endif
#endif

// Copy a matrix of 8 rows and columns, whose columns are contiguous, to one whose rows are.
#ifdef HAS_SHUFFLES
inline void turned(float* to, int64_t row, const float* from, int64_t column) {
  typedef Vector<float> V;
  V::Type a[8], b[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) a[i] = V::load(from + i * column);
#pragma GCC unroll 8
  for (int i = 0; i < 8; i += 2) {
    b[i] = __builtin_shufflevector(a[i], a[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    b[i + 1] = __builtin_shufflevector(a[i], a[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; i += 4) {
    a[i] = __builtin_shufflevector(b[i], b[i + 2], 0, 1, 8, 9, 4, 5, 12, 13);
    a[i + 1] = __builtin_shufflevector(b[i], b[i + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    a[i + 2] = __builtin_shufflevector(b[i + 1], b[i + 3], 0, 1, 8, 9, 4, 5, 12, 13);
    a[i + 3] = __builtin_shufflevector(b[i + 1], b[i + 3], 2, 3, 10, 11, 6, 7, 14, 15);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 4; ++i) {
    b[i] = __builtin_shufflevector(a[i], a[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    b[i + 4] = __builtin_shufflevector(a[i], a[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) V::store(to + i * row, b[i]);
}
#endif

template <typename T>
inline void turned(T* to, int64_t row, const T* from, int64_t column) {
  for (int j = 0; j < 8; ++j)
    for (int i = 0; i < 8; ++i) to[i * row + j] = from[j * column + i];
}

// Copy a matrix to one whose rows are contiguous.
template <typename T>
void copied(T* to, int64_t row, const Matrices<const T>& from, int rows, int columns) {
  int j = 0;
  for (; from.row == 1 && j + 8 <= columns; j += 8) {
    int i = 0;
    for (; i + 8 <= rows; i += 8) turned(to + i * row + j, row, from.data + i + j * from.column, from.column);
    for (; i < rows; ++i)
      for (int k = j; k < j + 8; ++k) to[i * row + k] = from.data[i + k * from.column];
  }
  for (int i = 0; i < rows; ++i)
    for (int k = j; k < columns; ++k) to[i * row + k] = from.data[i * from.row + k * from.column];
}

// out = a b for every pair of a batch; false where neither rows nor columns of the result are contiguous.
template <typename T>
bool products(Matrices<T> out, Matrices<const T> a, Matrices<const T> b, int64_t batch, int rows, int columns,
              int terms) {
  constexpr int width = Vector<T>::width;
  if ((columns > 1 && out.column != 1) || (columns < width && rows >= width && out.row == 1)) {
    // The transposed product has contiguous rows, or longer ones.
    const Matrices<const T> left = b.transposed();
    b = a.transposed();
    a = left;
    out = out.transposed();
    std::swap(rows, columns);
  }
  if (columns > 1 && out.column != 1) return false;
  const int whole = (columns + width - 1) / width * width;
  alignas(64) T packed[LARGEST * LARGEST], padded[LARGEST * LARGEST];
  for (int64_t i = 0; i < batch; ++i) {
    const T* of_b = b.data + i * b.batch;
    int64_t b_row = b.row;
    if (b.column != 1 || whole != columns) {
      b_row = whole;
      copied<T>(packed, b_row, {of_b, 0, b.row, b.column}, terms, columns);
      for (int k = 0; k < terms; ++k)
        for (int j = columns; j < whole; ++j) packed[k * b_row + j] = 0;
      of_b = packed;
    }
    T* to = out.data + i * out.batch;
    const Matrices<const T> of_a = {a.data + i * a.batch, 0, a.row, a.column};
    if (whole == columns) {
      product<T>({to, 0, out.row, 1}, of_a, of_b, b_row, rows, columns, terms);
    } else {
      product<T>({padded, 0, whole, 1}, of_a, of_b, b_row, rows, whole, terms);
      for (int r = 0; r < rows; ++r) std::memcpy(to + r * out.row, padded + r * whole, columns * sizeof(T));
    }
  }
  return true;
}

template <typename T>
Matrices<T> matrices(void* tensor) {
  void* data = nullptr;
  int64_t* strides = nullptr;
  aoti_torch_get_data_ptr(tensor, &data);
  aoti_torch_get_strides(tensor, &strides);
  return {static_cast<T*>(data), strides[0], strides[1], strides[2]};
}

template <typename T>
bool done(void* out, void* a, void* b, int64_t batch, int64_t rows, int64_t columns, int64_t terms) {
  return products<T>(matrices<T>(out), matrices<const T>(a), matrices<const T>(b), batch, rows, columns, terms);
}

bool fits(int64_t size) { return 0 < size && size <= LARGEST; }

}  // namespace

extern "C" int32_t metarun_bmm_out(void* out, void* a, void* b) {
  int64_t *of_out = nullptr, *of_a = nullptr;
  int32_t type = -1;
  aoti_torch_get_sizes(out, &of_out);
  aoti_torch_get_sizes(a, &of_a);
  aoti_torch_get_dtype(out, &type);
  const int64_t batch = of_out[0], rows = of_out[1], columns = of_out[2], terms = of_a[2];
  if (fits(rows) && fits(columns) && fits(terms)) {
    if (type == aoti_torch_dtype_float32() && done<float>(out, a, b, batch, rows, columns, terms)) return 0;
    if (type == aoti_torch_dtype_float64() && done<double>(out, a, b, batch, rows, columns, terms)) return 0;
  }
  return aoti_torch_cpu_bmm_out(out, a, b);
}
