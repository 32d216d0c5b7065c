// SPDX-License-Identifier: Apache-2.0
// Binds a struct of arguments to Python: one keyword argument a field, integers for addresses.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <type_traits>

namespace transducer {

using Address = std::uintptr_t;

template <typename T>
T* As(Address address) {
  return reinterpret_cast<T*>(address);
}

template <typename Struct, typename Value>
struct Field {
  const char* name;
  Value Struct::* member;

  // Takes the field's value from keyword arguments.
  void Set(const pybind11::kwargs& arguments, Struct* object) const {
    if (!arguments.contains(name)) {
      throw pybind11::type_error(std::string(name) + ": expected a keyword argument, got none");
    }
    const pybind11::object given = arguments[name];
    try {
      if constexpr (std::is_pointer_v<Value>) {
        object->*member = reinterpret_cast<Value>(given.cast<Address>());
      } else {
        object->*member = given.cast<Value>();
      }
    } catch (const pybind11::cast_error&) {
      throw pybind11::type_error(std::string(name) +
                                 ": expected a value of the field's type, got " +
                                 std::string(pybind11::str(pybind11::type::of(given))));
    }
  }
};

template <typename Struct, typename Value>
Field<Struct, Value> FieldOf(const char* name, Value Struct::* member) {
  return {name, member};
}

// Binds Struct as m.name. Its constructor takes every field by keyword, and nothing else. The class
// attribute `fields` lists their names.
template <typename Struct, typename... Fields>
void BindStruct(pybind11::module_& m, const char* name, Fields... fields) {
  pybind11::class_<Struct> bound(m, name);
  bound.def(pybind11::init([fields...](const pybind11::kwargs& arguments) {
    Struct object{};
    (fields.Set(arguments, &object), ...);
    if (arguments.size() != sizeof...(fields)) {
      throw pybind11::type_error("expected no keyword arguments but the fields, got " +
                                 std::string(pybind11::str(arguments.attr("keys")())));
    }
    return object;
  }));
  bound.attr("fields") = pybind11::make_tuple(fields.name...);
}

}  // namespace transducer
