// One build holds many mutants of a .cuh: mutate.py writes these calls into it, and the driver's argument says which is alive.
#pragma once

inline int simt_mutant = -1;
inline bool simt_is(int id) { return simt_mutant == id; }

struct SimtCompare {
  int id;
  char kind;
};
template <class A>
struct SimtLeft {
  A value;
  SimtCompare how;
};

// `a <simt_compare(7, '<')> b` is a < b, and a <= b in mutant 7. It binds as the operator that it replaces.
inline SimtCompare simt_compare(int id, char kind) { return {id, kind}; }
template <class A>
SimtLeft<A> operator<(const A& value, SimtCompare how) {
  return {value, how};
}
template <class A, class B>
bool operator>(const SimtLeft<A>& left, const B& right) {
  const bool alive = simt_is(left.how.id);
  switch (left.how.kind) {
    case '<':
      return alive ? left.value <= right : left.value < right;
    case 'l':
      return alive ? left.value < right : left.value <= right;
    case '>':
      return alive ? left.value >= right : left.value > right;
    default:
      return alive ? left.value > right : left.value >= right;
  }
}

// `a ==simt_equal(7, '=')== b` is a == b, and a != b in mutant 7.
struct SimtEqual {
  int id;
  char kind;
};
template <class A>
struct SimtLeftEqual {
  A value;
  SimtEqual how;
};
inline SimtEqual simt_equal(int id, char kind) { return {id, kind}; }
template <class A>
SimtLeftEqual<A> operator==(const A& value, SimtEqual how) {
  return {value, how};
}
template <class A, class B>
bool operator==(const SimtLeftEqual<A>& left, const B& right) {
  return (left.value == right) == (simt_is(left.how.id) != (left.how.kind == '='));
}
