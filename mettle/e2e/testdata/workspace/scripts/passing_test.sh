#!/bin/sh
grep -q "some data" scripts/data.txt || exit 1
echo "the data is there"
