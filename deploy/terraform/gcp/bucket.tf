resource "google_storage_bucket" "blobs" {
  name                        = var.bucket
  location                    = var.location
  uniform_bucket_level_access = true
  public_access_prevention    = "enforced"
  # Both would keep, and charge for, what the rules below delete.
  soft_delete_policy {
    retention_duration_seconds = 0
  }
  versioning {
    enabled = false
  }
  dynamic "lifecycle_rule" {
    for_each = jsondecode(file("${path.module}/../../gcs-lifecycle.json")).lifecycle.rule
    content {
      action {
        type = lifecycle_rule.value.action.type
      }
      condition {
        days_since_custom_time = lifecycle_rule.value.condition.daysSinceCustomTime
        matches_prefix         = [for p in lifecycle_rule.value.condition.matchesPrefix : "${var.bucket_prefix}/${p}"]
      }
    }
  }
  depends_on = [google_project_service.needed]
}
