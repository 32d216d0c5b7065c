// SPDX-License-Identifier: Apache-2.0
// The one error of the native core: what went wrong, and where.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace transducer {

class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

[[noreturn]] inline void Fail(const char* file, int line, const std::string& message) {
  std::ostringstream text;
  text << file << ":" << line << ": " << message;
  throw Error(text.str());
}

}  // namespace transducer

#define TRANSDUCER_CHECK(condition, message)                             \
  do {                                                                   \
    if (!(condition)) ::transducer::Fail(__FILE__, __LINE__, (message)); \
  } while (false)
