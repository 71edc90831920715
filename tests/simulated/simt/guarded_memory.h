// Memory that shows who reads what nobody wrote, and who goes beyond it; the arrays of a test lie in it.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "error.h"

namespace simt {

constexpr unsigned char kPoison = 0xff;  // NaN in every floating-point type, -1 in every integer
constexpr std::size_t kPage = 4096;

// Poisoned memory between two pages that fault. By the seed it touches the one before or the one after; what is left
// over on the other side is filled with a pattern that must still be there at the end.
class Guarded {
public:
    Guarded(std::size_t size, bool against_end) : size_(size) {
        // Sizes are rounded up for alignment: the last few bytes past an odd size are checked by the pattern only.
        const std::size_t aligned = (size + 15) / 16 * 16;
        inner_ = std::max(kPage, (aligned + kPage - 1) / kPage * kPage);
        base_ = static_cast<unsigned char*>(
            mmap(nullptr, inner_ + 2 * kPage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
        if (base_ == MAP_FAILED) throw std::bad_alloc();
        mprotect(base_ + kPage, inner_, PROT_READ | PROT_WRITE);
        data_ = base_ + kPage + (against_end ? inner_ - aligned : 0);
        std::memset(base_ + kPage, kPattern, inner_);
        poison();
    }
    Guarded(const Guarded&) = delete;
    ~Guarded() { munmap(base_, inner_ + 2 * kPage); }
    unsigned char* data() const { return data_; }
    std::size_t size() const { return size_; }
    void poison() { std::memset(data_, kPoison, size_); }
    void forbid() { mprotect(base_ + kPage, inner_, PROT_NONE); }
    void permit() { mprotect(base_ + kPage, inner_, PROT_READ | PROT_WRITE); }
    bool covers(const void* address) const { return address >= base_ && address < base_ + inner_ + 2 * kPage; }
    bool holds(const void* address, std::size_t bytes) const {
        return address >= data_ && static_cast<const unsigned char*>(address) + bytes <= data_ + size_;
    }
    bool intact() const {
        const auto clean = [](const unsigned char* from, const unsigned char* to) {
            return std::all_of(from, to, [](unsigned char byte) { return byte == kPattern; });
        };
        return clean(base_ + kPage, data_) && clean(data_ + size_, base_ + kPage + inner_);
    }

private:
    static constexpr unsigned char kPattern = 0xa5;
    std::size_t size_, inner_;
    unsigned char *base_, *data_;
};

// What tests have allocated: global memory.
class GlobalMemory {
public:
    // Against a page that may not be touched: the one after the array, or else the one before.
    Guarded* allocate(std::size_t size, bool against_end) {
        arrays_.push_back(std::make_unique<Guarded>(size, against_end));
        return arrays_.back().get();
    }
    void release_all() { arrays_.clear(); }
    void check() const {
        for (const auto& array : arrays_)
            if (!array->intact())
                throw Error(text("global memory: written outside an array of ", array->size(), " bytes"));
    }
    // The array that an address lies in or beside; null if there is none.
    const Guarded* around(const void* address) const {
        for (const auto& array : arrays_)
            if (array->covers(address)) return array.get();
        return nullptr;
    }

private:
    std::vector<std::unique_ptr<Guarded>> arrays_;
};

inline GlobalMemory global_memory;

}  // namespace simt
