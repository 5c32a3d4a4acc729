#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <new>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "../dtype.h"

namespace neq::cpu {

// Uninitialised scratch memory, aligned to cache lines. It grows as needed and loses its contents.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { ::operator delete(data_, kAlignment); }

  T* reserve(int64_t size) {
    if (size > size_) {
      ::operator delete(data_, kAlignment);
      data_ = nullptr;
      data_ = static_cast<T*>(::operator new(size * sizeof(T), kAlignment));
      size_ = size;
    }
    return data_;
  }

 private:
  static constexpr std::align_val_t kAlignment{kLineBytes};
  T* data_ = nullptr;
  int64_t size_ = 0;
};

// A list of memory to prefetch into the second-level cache, some cache lines at a time.
class Prefetch {
 public:
  void clear() {
    pieces_.clear();
    piece_ = 0;
    offset_ = lines = 0;
  }
  void add(const void* begin, int64_t bytes) {
    lines += ceil_div(bytes, kLineBytes);
    const char* at = static_cast<const char*>(begin);
    if (!pieces_.empty() && pieces_.back().begin + pieces_.back().bytes == at)
      pieces_.back().bytes += bytes;
    else
      pieces_.push_back({at, bytes});
  }
  // The next `lines` cache lines, which the caller prefetches; null if they are not contiguous.
  const char* take(int64_t lines) {
    if (piece_ == pieces_.size()) return nullptr;
    const Piece piece = pieces_[piece_];
    const int64_t begin = offset_, end = begin + lines * kLineBytes;
    if (end > piece.bytes) return nullptr;
    offset_ = end;
    return piece.begin + begin;
  }
  void fetch(int64_t lines) {
    while (lines > 0 && piece_ < pieces_.size()) {
      const Piece piece = pieces_[piece_];
      const int64_t end = std::min(piece.bytes, offset_ + lines * kLineBytes);
      for (; offset_ < end; offset_ += kLineBytes, --lines)
        __builtin_prefetch(piece.begin + offset_, 0, 2);
      if (offset_ >= piece.bytes) ++piece_, offset_ = 0;
    }
  }

  int64_t lines = 0;  // in all

 private:
  struct Piece {
    const char* begin;
    int64_t bytes;
  };
  std::vector<Piece> pieces_;
  size_t piece_ = 0;
  int64_t offset_ = 0;
};

// Asks for large pages. Fresh memory faults once for each page that is first written, which large
// pages make several times faster. A hint, which some systems ignore.
inline void prefer_large_pages(void* begin, size_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kPage = 2 << 20;
  const uintptr_t first = (uintptr_t(begin) + kPage - 1) / kPage * kPage;
  const uintptr_t last = (uintptr_t(begin) + bytes) / kPage * kPage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)begin, (void)bytes;
#endif
}

}  // namespace neq::cpu
