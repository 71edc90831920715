// What a kernel or a launch did wrong.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace simt {

struct Error : std::runtime_error {
    using std::runtime_error::runtime_error;
};

template <typename... Parts>
std::string text(const Parts&... parts) {
    std::ostringstream out;
    (out << ... << parts);
    return out.str();
}

}  // namespace simt
