#pragma once
#include <string>

// Greeting greets who, and says which version does.
std::string Greeting(const std::string& who);
