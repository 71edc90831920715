// A place in a source: for messages, to tell barriers apart, and to take one of them out.
#pragma once

#include <cstring>
#include <string>

namespace simt {

struct Site {
    const char* file;
    int line;
    // As a default argument: the place of the call.
    static Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
    bool operator==(const Site& other) const { return line == other.line && std::strcmp(file, other.file) == 0; }
    const char* name() const {
        const char* slash = std::strrchr(file, '/');
        return slash ? slash + 1 : file;
    }
    std::string text() const { return std::string(name()) + ":" + std::to_string(line); }
};

// Which barrier, fence or wait does nothing, so that a test sees whether anybody notices; none with line 0.
struct Removal {
    std::string file;
    int line = 0;
    bool covers(Site site) const { return site.line == line && site.name() == file; }
};

inline Removal removal;

}  // namespace simt
