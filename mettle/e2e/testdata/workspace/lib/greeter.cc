#include "lib/greeter.h"

#include "lib/version.h"

std::string Greeting(const std::string& who) {
  return "Hello, " + who + ", from " + GREETER_VERSION;
}
