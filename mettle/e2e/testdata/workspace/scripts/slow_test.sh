#!/bin/sh
echo "marker-of-the-slow-test: printed before the timeout"
sleep 3600 &
wait
