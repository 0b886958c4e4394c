output "queue" {
  description = "For --queue of mettle api and mettle worker."
  value       = "gcppubsub://${var.project}/${var.queue_prefix}?lease=${var.lease_seconds}s&attempts=${var.attempts}"
}

output "storage" {
  description = "For --storage of elan."
  value       = "gs://${google_storage_bucket.blobs.name}/${var.bucket_prefix}"
}

output "service_accounts" {
  description = "For the annotations of the overlay gcp."
  value       = { for name, account in google_service_account.program : name => account.email }
}
