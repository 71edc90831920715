// What a library of tests exports beside its entries.
#pragma once

#include <exception>
#include <string>

#include "bank_conflicts.h"

namespace simt {

// Runs a test's entry and all that it launches; null, or what went wrong.
template <typename Body>
const char* report(Body body) {
    static std::string message;
    try {
        body();
        machine.synchronize();
        return nullptr;
    } catch (const std::exception& error) {
        machine.discard();
        message = error.what();
        return message.c_str();
    }
}

}  // namespace simt

extern "C" {
__attribute__((used)) inline void simt_configure(unsigned seed, int multiprocessors) {
    simt::machine.seed = seed;
    simt::machine.multiprocessors = multiprocessors;
}
// Of a source's file name without its folder.
__attribute__((used)) inline void simt_remove(const char* file, int line) { simt::removal = {file, line}; }
// How many grids were launched since the last call.
__attribute__((used)) inline int simt_launches() {
    const int launches = static_cast<int>(simt::machine.launched.size());
    simt::machine.launched.clear();
    return launches;
}
// What plain accesses did since the last call, if they were counted (bank_conflicts.h), and whether they are from now
// on. While shared memory is `closed`, nothing else reaches it but ldmatrix and cp.async.
__attribute__((used)) inline const char* simt_plain_accesses(bool counted, bool closed) {
    static std::string told;
    told = simt::plain_accesses.told();
    simt::plain_accesses.clear();
    simt::plain_accesses.counts = counted;
    simt::shared_memory_closed = closed;
    return told.c_str();
}
__attribute__((used)) inline void* simt_allocate(std::size_t size) {
    return simt::global_memory.allocate(size, simt::machine.seed % 2 == 0)->data();
}
__attribute__((used)) inline void simt_release() { simt::global_memory.release_all(); }
}
