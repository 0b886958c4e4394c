package wire

import "google.golang.org/protobuf/encoding/protowire"

// The tags of the fields that are read by hand: number and type in one byte, as
// all encoders write those of numbers up to 15.
const (
	bytesField1  = 1<<3 | byte(protowire.BytesType) // also of strings and messages
	bytesField2  = 2<<3 | byte(protowire.BytesType)
	bytesField3  = 3<<3 | byte(protowire.BytesType)
	bytesField10 = 10<<3 | byte(protowire.BytesType)
	varintField2 = 2<<3 | byte(protowire.VarintType)
	varintField3 = 3<<3 | byte(protowire.VarintType)
	varintField4 = 4<<3 | byte(protowire.VarintType)
	varintField5 = 5<<3 | byte(protowire.VarintType)
)
