#include <iostream>

#include "lib/greeter.h"

int main() {
  const std::string got = Greeting("test");
  const std::string want = "Hello, test, from 1.2.3";
  if (got != want) {
    std::cerr << "got " << got << ", want " << want << std::endl;
    return 1;
  }
  std::cout << "greeter says the right thing" << std::endl;
  return 0;
}
