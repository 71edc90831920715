// Throwing checks that name the values.
#pragma once

#include <sstream>
#include <stdexcept>

namespace skipnet {

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
    std::ostringstream message;
    (message << ... << parts);
    throw std::invalid_argument(message.str());
}

// check(count == 3, "rows: expected 3, got ", count) throws std::invalid_argument (a ValueError in Python).
template <typename... Parts>
void check(bool condition, const Parts&... parts) {
    if (!condition) fail(parts...);
}

}  // namespace skipnet
