// Working memory of one task of a parallel loop on the CPU:
//
//   Scratch scratch;
//   float* sums = scratch.take<float>(count);
//
// A thread keeps it for its next task, unless it is large: to touch fresh pages for the first time
// costs as much as many passes over them.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <utility>
#include <vector>

namespace regkernels {

class Scratch {
 public:
  Scratch() {
    if (kept().data) blocks_.push_back(std::move(kept()));
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  ~Scratch() {
    size_t size = 0;
    for (const Block& block : blocks_) size += block.size;
    if (size == 0 || size > kMostKept) return;
    // Next time all of it will be one block.
    kept() = blocks_.size() == 1 ? std::move(blocks_[0]) : Block(size);
  }

  // Memory for `count` values, which is uninitialised, begins at a cache line of its own, and lasts
  // as long as the scratch.
  template <class T>
  T* take(int64_t count) {
    const size_t size = (count * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
    if (blocks_.empty() || blocks_.back().size - used_ < size) {
      blocks_.emplace_back(std::max(size, kLeast));
      used_ = 0;
      if (!blocks_.back().data) throw std::bad_alloc();
    }
    T* const result = reinterpret_cast<T*>(blocks_.back().data.get() + used_);
    used_ += size;
    return result;
  }

 private:
  static constexpr size_t kAlignment = 64;
  static constexpr size_t kLeast = size_t{1} << 16;
  static constexpr size_t kMostKept = size_t{1} << 22;  // a thread keeps no more than this

  struct Free {
    void operator()(std::byte* data) const { std::free(data); }
  };
  // A block has no data if there was no memory to be had.
  struct Block {
    Block() = default;
    explicit Block(size_t bytes)
        : size(bytes), data(static_cast<std::byte*>(std::aligned_alloc(kAlignment, bytes))) {}
    size_t size = 0;
    std::unique_ptr<std::byte, Free> data;
  };

  static Block& kept() {
    static thread_local Block block;
    return block;
  }

  std::vector<Block> blocks_;
  size_t used_ = 0;  // bytes of the last block
};

}  // namespace regkernels
